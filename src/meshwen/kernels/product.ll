; SPDX-License-Identifier: Apache-2.0
;
; The matrix product y = a b: a [M, K], b [K, N] bfloat16, y [M, N] float32, with K even and N >= 32.
; `tiles.py` adds the tiles, of 32 columns and up to 12 rows, and a table @tiles of them by rows - 1.

%Product = type {
  %Job,
  ptr, ptr, ptr,     ; 1 a, 2 b, 3 y
  i64, i64, i64,     ; 4 M, 5 K, 6 N
  i64, i64           ; 7 panels of 32 columns, 8 panels a unit
}

; All rows of a panel of columns. The last panel ends with the last column: where it overlaps the
; one before, both write the same numbers.
define internal void @panel(ptr %job, i64 %p) {
entry:
  %job.value = load %Product, ptr %job
  %a = extractvalue %Product %job.value, 1
  %b = extractvalue %Product %job.value, 2
  %y = extractvalue %Product %job.value, 3
  %M = extractvalue %Product %job.value, 4
  %K = extractvalue %Product %job.value, 5
  %N = extractvalue %Product %job.value, 6
  %column.even = mul i64 %p, 32
  %column.last = sub i64 %N, 32
  %column = call i64 @llvm.umin.i64(i64 %column.even, i64 %column.last)
  %b.panel = getelementptr bfloat, ptr %b, i64 %column
  %y.panel = getelementptr float, ptr %y, i64 %column
  %a.stride = mul i64 %K, 2
  %b.stride = mul i64 %N, 2
  %y.stride = mul i64 %N, 4
  %pairs = udiv i64 %K, 2
  %M.up = add i64 %M, 11
  %blocks = udiv i64 %M.up, 12
  ; The panel to the right is fetched while the second block of rows (or the only one) is summed:
  ; the first waits for memory itself.
  %block.last = sub i64 %blocks, 1
  %fetching = call i64 @llvm.umin.i64(i64 1, i64 %block.last)
  br label %block
block:
  %q = phi i64 [ 0, %entry ], [ %q.next, %block ]
  %m = phi i64 [ 0, %entry ], [ %m.next, %block ]
  %rows.left = sub i64 %M, %m
  %blocks.left = sub i64 %blocks, %q
  %blocks.left.less = sub i64 %blocks.left, 1
  %rows.up = add i64 %rows.left, %blocks.left.less
  %rows = udiv i64 %rows.up, %blocks.left
  %rows.less = sub i64 %rows, 1
  %tile.at = getelementptr ptr, ptr @tiles, i64 %rows.less
  %tile = load ptr, ptr %tile.at
  %a.offset = mul i64 %m, %a.stride
  %a.block = getelementptr i8, ptr %a, i64 %a.offset
  %y.offset = mul i64 %m, %y.stride
  %y.block = getelementptr i8, ptr %y.panel, i64 %y.offset
  %fetches = icmp eq i64 %q, %fetching
  %ahead = select i1 %fetches, i64 64, i64 0
  call void %tile(ptr %a.block, i64 %a.stride, ptr %b.panel, i64 %b.stride,
                  ptr %y.block, i64 %y.stride, i64 %pairs, i64 %ahead)
  %m.next = add i64 %m, %rows
  %q.next = add i64 %q, 1
  %more = icmp ult i64 %q.next, %blocks
  br i1 %more, label %block, label %end
end:
  ret void
}

define internal void @panels(ptr %job, i64 %unit) {
entry:
  %job.value = load %Product, ptr %job
  %panels = extractvalue %Product %job.value, 7
  %unit.panels = extractvalue %Product %job.value, 8
  %first = mul i64 %unit, %unit.panels
  %behind = add i64 %first, %unit.panels
  %last = call i64 @llvm.umin.i64(i64 %behind, i64 %panels)
  br label %panel
panel:
  %p = phi i64 [ %first, %entry ], [ %p.next, %panel ]
  call void @panel(ptr %job, i64 %p)
  %p.next = add i64 %p, 1
  %more = icmp ult i64 %p.next, %last
  br i1 %more, label %panel, label %end
end:
  ret void
}

; XLA_FFI_Error* product(XLA_FFI_CallFrame*)
define ptr @product(ptr %frame) {
entry:
  %described = call i1 @described(ptr %frame)
  br i1 %described, label %end, label %execute
end:
  ret ptr null
execute:
  %a.buffer = call ptr @argument(ptr %frame, i64 0)
  %b.buffer = call ptr @argument(ptr %frame, i64 1)
  %y.buffer = call ptr @result(ptr %frame)
  %a = call ptr @data(ptr %a.buffer)
  %b = call ptr @data(ptr %b.buffer)
  %y = call ptr @data(ptr %y.buffer)
  %M = call i64 @dim(ptr %a.buffer, i64 0)
  %K = call i64 @dim(ptr %b.buffer, i64 0)
  %N = call i64 @dim(ptr %b.buffer, i64 1)
  %N.up = add i64 %N, 31
  %panels = udiv i64 %N.up, 32
  ; Neighbours, of which one is fetched while the other is summed; but a few units a thread, so that
  ; one that comes late holds up nothing.
  %threads = call i64 @threads(ptr %frame)
  %parts = mul i64 %threads, 4
  %panels.up = add i64 %panels, %parts
  %panels.less = sub i64 %panels.up, 1
  %unit.panels = udiv i64 %panels.less, %parts
  %units.up = add i64 %panels, %unit.panels
  %units.less = sub i64 %units.up, 1
  %units = udiv i64 %units.less, %unit.panels
  %job = call ptr @malloc(i64 104)
  %j.1 = insertvalue %Product zeroinitializer, ptr %a, 1
  %j.2 = insertvalue %Product %j.1, ptr %b, 2
  %j.3 = insertvalue %Product %j.2, ptr %y, 3
  %j.4 = insertvalue %Product %j.3, i64 %M, 4
  %j.5 = insertvalue %Product %j.4, i64 %K, 5
  %j.6 = insertvalue %Product %j.5, i64 %N, 6
  %j.7 = insertvalue %Product %j.6, i64 %panels, 7
  %j.8 = insertvalue %Product %j.7, i64 %unit.panels, 8
  store %Product %j.8, ptr %job
  %error = call ptr @shared(ptr %frame, ptr %job, i64 %units, ptr @panels)
  ret ptr %error
}
