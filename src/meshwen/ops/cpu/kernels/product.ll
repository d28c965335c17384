; SPDX-License-Identifier: Apache-2.0
;
; The matrix product y = a b: a [M, K], y [M, N] float32, and b a packed weight: panels of 32 columns,
; each from its first step to its last, 128 bytes a step. `tiles.py` adds the tiles of each kind of
; product, of 32 columns and up to 12 rows, and of two panels and few rows, and tables of them by rows - 1.
;
; A panel is multiplied with all rows of a, as many at a time as registers have room for, by chunks
; that stay in the nearest cache. The next chunk is fetched meanwhile. Memory is read from one end to
; the other.

; Bytes of a column of b a step, of a row of a a step; steps that are summed by themselves; tables of
; tiles, and of those of two panels; void unpack(to, from, steps), or null.
%Kind = type { i64, i64, i64, ptr, ptr, ptr }

%Product = type {
  %Job,
  ptr, ptr, ptr,     ; 1 a, 2 b, 3 y
  i64, i64, i64,     ; 4 rows, 5 steps, 6 columns
  ptr,               ; 7 kind
  i64, i64           ; 8 panels, 9 panels a unit
}

@nothing = internal constant [256 x i8] zeroinitializer, align 64

declare ptr @aligned_alloc(i64, i64)
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)

; Pairs of bfloat16 of a panel, as float32: two rows of 128 bytes a step.
define internal void @unpack(ptr %to, ptr %from, i64 %steps) {
entry:
  br label %step
step:
  %s = phi i64 [ 0, %entry ], [ %s.next, %step ]
  %source = phi ptr [ %from, %entry ], [ %source.next, %step ]
  %target = phi ptr [ %to, %entry ], [ %target.next, %step ]
  %pairs = load <32 x i32>, ptr %source, align 64
  %low = shl <32 x i32> %pairs, splat (i32 16)
  %high = and <32 x i32> %pairs, splat (i32 -65536)
  %target.high = getelementptr i8, ptr %target, i64 128
  store <32 x i32> %low, ptr %target, align 64
  store <32 x i32> %high, ptr %target.high, align 64
  %source.next = getelementptr i8, ptr %source, i64 128
  %target.next = getelementptr i8, ptr %target, i64 256
  %s.next = add i64 %s, 1
  %more = icmp ult i64 %s.next, %steps
  br i1 %more, label %step, label %end
end:
  ret void
}

; All rows of one panel, or of two that are whole. Chunks of 128 additions are summed by themselves,
; then added up: in float32 that is several times as accurate as one long sum. `%space` has room for a
; chunk and for the sums of all rows.
define internal void @panel(ptr %job, i64 %p, i1 %two, ptr %space) {
entry:
  %job.value = load %Product, ptr %job
  %a = extractvalue %Product %job.value, 1
  %b = extractvalue %Product %job.value, 2
  %y = extractvalue %Product %job.value, 3
  %M = extractvalue %Product %job.value, 4
  %steps = extractvalue %Product %job.value, 5
  %N = extractvalue %Product %job.value, 6
  %kind = extractvalue %Product %job.value, 7
  %kind.value = load %Kind, ptr %kind
  %a.bytes = extractvalue %Kind %kind.value, 1
  %run = extractvalue %Kind %kind.value, 2
  %single = extractvalue %Kind %kind.value, 3
  %paired = extractvalue %Kind %kind.value, 4
  %unpack = extractvalue %Kind %kind.value, 5
  %panel.bytes = mul i64 %steps, 128
  %b.offset = mul i64 %p, %panel.bytes
  %b.panel = getelementptr i8, ptr %b, i64 %b.offset
  %column = mul i64 %p, 32
  %columns.left = sub i64 %N, %column
  %columns = call i64 @llvm.umin.i64(i64 %columns.left, i64 32)
  %is.whole = icmp eq i64 %columns, 32
  %y.panel = getelementptr float, ptr %y, i64 %column
  %a.stride = mul i64 %steps, %a.bytes
  %y.stride = mul i64 %N, 4
  %sums.stride = select i1 %two, i64 256, i64 128
  %sums = getelementptr i8, ptr %space, i64 16384
  %tile.rows = load i64, ptr @tile.rows
  %blocks = call i64 @quotient_up(i64 %M, i64 %tile.rows)
  %is.near = icmp ule i64 %M, %tile.rows
  %many = icmp ugt i64 %M, 12
  %can.unpack = icmp ne ptr %unpack, null
  %unpacks = and i1 %many, %can.unpack
  %unpacked.rows = select i1 %unpacks, i64 2, i64 1
  %single.used = select i1 %unpacks, ptr @tiles_float32, ptr %single
  %tiles = select i1 %two, ptr %paired, ptr %single.used
  ; Rows that are one tile go through memory so fast that what they need themselves is fetched; more
  ; have the next chunk fetched, the first blocks its shares.
  %fetches = call i64 @llvm.umin.i64(i64 %blocks, i64 4)
  %fetch.tiles = mul i64 %fetches, %unpacked.rows
  %fetch.stride = udiv i64 128, %fetch.tiles
  br label %chunk
chunk:
  %k = phi i64 [ 0, %entry ], [ %k.next, %chunk.end ]
  %k.offset = mul i64 %k, 128
  %b.chunk = getelementptr i8, ptr %b.panel, i64 %k.offset
  %steps.left = sub i64 %steps, %k
  %chunk.steps = call i64 @llvm.umin.i64(i64 %run, i64 %steps.left)
  %k.next = add i64 %k, %chunk.steps
  %is.first = icmp eq i64 %k, 0
  %is.last = icmp eq i64 %k.next, %steps
  %ends = and i1 %is.last, %is.whole
  %chunk.bytes = mul i64 %chunk.steps, 128
  %distance = select i1 %is.near, i64 1024, i64 %chunk.bytes
  %ahead.chunk = getelementptr i8, ptr %b.chunk, i64 %distance
  %tile.steps = mul i64 %chunk.steps, %unpacked.rows
  %share.bytes = mul i64 %tile.steps, %fetch.stride
  br i1 %unpacks, label %copy, label %ready
copy:
  call void %unpack(ptr %space, ptr %b.chunk, i64 %chunk.steps)
  br label %ready
ready:
  %b.tile = phi ptr [ %b.chunk, %chunk ], [ %space, %copy ]
  %a.offset.k = mul i64 %k, %a.bytes
  %a.chunk = getelementptr i8, ptr %a, i64 %a.offset.k
  br label %block
block:
  %q = phi i64 [ 0, %ready ], [ %q.next, %block ]
  %m = phi i64 [ 0, %ready ], [ %m.next, %block ]
  %rows.left = sub i64 %M, %m
  %blocks.left = sub i64 %blocks, %q
  %rows = call i64 @quotient_up(i64 %rows.left, i64 %blocks.left)
  %rows.less = sub i64 %rows, 1
  %tile.at = getelementptr ptr, ptr %tiles, i64 %rows.less
  %tile = load ptr, ptr %tile.at
  %a.offset = mul i64 %m, %a.stride
  %a.block = getelementptr i8, ptr %a.chunk, i64 %a.offset
  %y.offset = mul i64 %m, %y.stride
  %y.block = getelementptr i8, ptr %y.panel, i64 %y.offset
  %sums.offset = mul i64 %m, %sums.stride
  %sums.block = getelementptr i8, ptr %sums, i64 %sums.offset
  %from = select i1 %is.first, ptr @nothing, ptr %sums.block
  %from.stride = select i1 %is.first, i64 0, i64 %sums.stride
  %to = select i1 %ends, ptr %y.block, ptr %sums.block
  %to.stride = select i1 %ends, i64 %y.stride, i64 %sums.stride
  %share.offset = mul i64 %q, %share.bytes
  %ahead.share = getelementptr i8, ptr %ahead.chunk, i64 %share.offset
  %is.fetching = icmp ult i64 %q, %fetches
  %ahead = select i1 %is.fetching, ptr %ahead.share, ptr %b.tile
  %ahead.stride = select i1 %is.fetching, i64 %fetch.stride, i64 0
  call void %tile(ptr %a.block, i64 %a.stride, ptr %b.tile, i64 128, ptr %from, i64 %from.stride,
                  ptr %to, i64 %to.stride, i64 %tile.steps, ptr %ahead, i64 %ahead.stride,
                  i64 %panel.bytes)
  %m.next = add i64 %m, %rows
  %q.next = add i64 %q, 1
  %more = icmp ult i64 %q.next, %blocks
  br i1 %more, label %block, label %chunk.end
chunk.end:
  br i1 %is.last, label %end, label %chunk
end:
  br i1 %is.whole, label %done, label %part
part:
  ; Of the last panel, only some columns are there.
  %bytes = mul i64 %columns, 4
  br label %row
row:
  %r = phi i64 [ 0, %part ], [ %r.next, %row ]
  %r.sums.offset = mul i64 %r, 128
  %r.sums = getelementptr i8, ptr %sums, i64 %r.sums.offset
  %r.y.offset = mul i64 %r, %y.stride
  %r.y = getelementptr i8, ptr %y.panel, i64 %r.y.offset
  call void @llvm.memcpy.p0.p0.i64(ptr %r.y, ptr %r.sums, i64 %bytes, i1 false)
  %r.next = add i64 %r, 1
  %more.rows = icmp ult i64 %r.next, %M
  br i1 %more.rows, label %row, label %done
done:
  ret void
}

define internal void @panels(ptr %job, i64 %unit) {
entry:
  %job.value = load %Product, ptr %job
  %M = extractvalue %Product %job.value, 4
  %N = extractvalue %Product %job.value, 6
  %panels = extractvalue %Product %job.value, 8
  %unit.panels = extractvalue %Product %job.value, 9
  %first = mul i64 %unit, %unit.panels
  %behind = add i64 %first, %unit.panels
  %last = call i64 @llvm.umin.i64(i64 %behind, i64 %panels)
  %whole = udiv i64 %N, 32
  %last.whole = call i64 @llvm.umin.i64(i64 %last, i64 %whole)
  %paired.rows = load i64, ptr @paired.rows
  %few = icmp ule i64 %M, %paired.rows
  %sums.bytes = mul i64 %M, 256
  %space.bytes = add i64 %sums.bytes, 16384
  %space = call ptr @aligned_alloc(i64 64, i64 %space.bytes)
  br label %panel
panel:
  %p = phi i64 [ %first, %entry ], [ %p.next, %panel ]
  %p.two = add i64 %p, 2
  %fits = icmp ule i64 %p.two, %last.whole
  %two = and i1 %few, %fits
  call void @panel(ptr %job, i64 %p, i1 %two, ptr %space)
  %p.one = add i64 %p, 1
  %p.next = select i1 %two, i64 %p.two, i64 %p.one
  %more = icmp ult i64 %p.next, %last
  br i1 %more, label %panel, label %end
end:
  call void @free(ptr %space)
  ret void
}

define internal ptr @product(ptr %frame, ptr %kind, i64 %threads.most) {
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
  %M = call i64 @dim(ptr %y.buffer, i64 0)
  %N = call i64 @dim(ptr %y.buffer, i64 1)
  %panels = call i64 @dim(ptr %b.buffer, i64 0)
  %steps = call i64 @dim(ptr %b.buffer, i64 1)
  %threads = call i64 @threads(ptr %frame, i64 %threads.most)
  %unit.panels = call i64 @unit(i64 %panels, i64 %threads)
  %units = call i64 @quotient_up(i64 %panels, i64 %unit.panels)
  %job = call ptr @malloc(i64 128)
  %j.1 = insertvalue %Product zeroinitializer, ptr %a, 1
  %j.2 = insertvalue %Product %j.1, ptr %b, 2
  %j.3 = insertvalue %Product %j.2, ptr %y, 3
  %j.4 = insertvalue %Product %j.3, i64 %M, 4
  %j.5 = insertvalue %Product %j.4, i64 %steps, 5
  %j.6 = insertvalue %Product %j.5, i64 %N, 6
  %j.7 = insertvalue %Product %j.6, ptr %kind, 7
  %j.8 = insertvalue %Product %j.7, i64 %panels, 8
  %j.9 = insertvalue %Product %j.8, i64 %unit.panels, 9
  store %Product %j.9, ptr %job
  %error = call ptr @shared(ptr %frame, ptr %job, i64 %units, ptr @panels, i64 %threads)
  ret ptr %error
}
