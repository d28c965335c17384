; SPDX-License-Identifier: Apache-2.0
;
; The product y = a b of a float32 a [M, K], which is quantised here, and a quantised b: see `int8.py`,
; which adds the tiles, of 32 columns and some rows, and a table of them by rows - 1.
;
; First a is quantised, by the same rule as b: groups of 32 numbers that share a scale. Then each panel
; of b, which lies in memory as it is read, is multiplied with some rows of a at a time. Sums within a
; group are of integers, and exact; groups are added up in float32, one behind the other.

%Int8 = type {
  %Job,
  ptr, ptr, ptr, ptr,    ; 1 a, 2 quantised [M, K], 3 scales of a [M, K/32], 4 corrections of sums, the same
  ptr, ptr, ptr,         ; 5 values of b [N/32, K/4, 32, 4], 6 scales of b [N/32, K/32, 32], 7 y [M, N]
  i64, i64, i64,         ; 8 rows, 9 groups, 10 columns
  i64, i64               ; 11 rows of a, or panels of b; 12 of them a unit
}

declare <8 x i32> @llvm.x86.avx.cvt.ps2dq.256(<8 x float>)
declare i32 @llvm.vector.reduce.umax.v32i32(<32 x i32>)
declare i32 @llvm.vector.reduce.add.v32i32(<32 x i32>)

; Quantises some rows. Numbers that are not finite have a scale that is not.
define internal void @int8_rows(ptr %job, i64 %unit) {
entry:
  %job.value = load %Int8, ptr %job
  %a = extractvalue %Int8 %job.value, 1
  %quantised = extractvalue %Int8 %job.value, 2
  %scales = extractvalue %Int8 %job.value, 3
  %corrections = extractvalue %Int8 %job.value, 4
  %groups = extractvalue %Int8 %job.value, 9
  %rows = extractvalue %Int8 %job.value, 11
  %unit.rows = extractvalue %Int8 %job.value, 12
  %first.row = mul i64 %unit, %unit.rows
  %behind.row = add i64 %first.row, %unit.rows
  %last.row = call i64 @llvm.umin.i64(i64 %behind.row, i64 %rows)
  ; Rows lie behind one another: their groups are one run.
  %first = mul i64 %first.row, %groups
  %last = mul i64 %last.row, %groups
  br label %group
group:
  %g = phi i64 [ %first, %entry ], [ %g.next, %group ]
  %place = mul i64 %g, 32
  %a.at = getelementptr float, ptr %a, i64 %place
  %numbers = load <32 x float>, ptr %a.at, align 4
  %bits = bitcast <32 x float> %numbers to <32 x i32>
  %sizes = and <32 x i32> %bits, splat (i32 2147483647)
  %largest.bits = call i32 @llvm.vector.reduce.umax.v32i32(<32 x i32> %sizes)
  %largest = bitcast i32 %largest.bits to float
  %scale = fdiv float %largest, 127.0
  ; Smaller ones, whose inverse may be infinite, become zeros.
  %counts = fcmp ogt float %largest, 0x3870000000000000
  %inverse.any = fdiv float 127.0, %largest
  %inverse = select i1 %counts, float %inverse.any, float 0.0
  %inverse.one = insertelement <32 x float> poison, float %inverse, i32 0
  %inverses = shufflevector <32 x float> %inverse.one, <32 x float> poison, <32 x i32> zeroinitializer
  %scaled = fmul <32 x float> %numbers, %inverses
  %scaled.0 = shufflevector <32 x float> %scaled, <32 x float> poison,
    <8 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7>
  %scaled.1 = shufflevector <32 x float> %scaled, <32 x float> poison,
    <8 x i32> <i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15>
  %scaled.2 = shufflevector <32 x float> %scaled, <32 x float> poison,
    <8 x i32> <i32 16, i32 17, i32 18, i32 19, i32 20, i32 21, i32 22, i32 23>
  %scaled.3 = shufflevector <32 x float> %scaled, <32 x float> poison,
    <8 x i32> <i32 24, i32 25, i32 26, i32 27, i32 28, i32 29, i32 30, i32 31>
  %rounded.0 = call <8 x i32> @llvm.x86.avx.cvt.ps2dq.256(<8 x float> %scaled.0)
  %rounded.1 = call <8 x i32> @llvm.x86.avx.cvt.ps2dq.256(<8 x float> %scaled.1)
  %rounded.2 = call <8 x i32> @llvm.x86.avx.cvt.ps2dq.256(<8 x float> %scaled.2)
  %rounded.3 = call <8 x i32> @llvm.x86.avx.cvt.ps2dq.256(<8 x float> %scaled.3)
  %half.0 = shufflevector <8 x i32> %rounded.0, <8 x i32> %rounded.1,
    <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7,
                i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15>
  %half.1 = shufflevector <8 x i32> %rounded.2, <8 x i32> %rounded.3,
    <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7,
                i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15>
  %rounded = shufflevector <16 x i32> %half.0, <16 x i32> %half.1,
    <32 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7,
                i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15,
                i32 16, i32 17, i32 18, i32 19, i32 20, i32 21, i32 22, i32 23,
                i32 24, i32 25, i32 26, i32 27, i32 28, i32 29, i32 30, i32 31>
  %bytes = trunc <32 x i32> %rounded to <32 x i8>
  %quantised.at = getelementptr i8, ptr %quantised, i64 %place
  store <32 x i8> %bytes, ptr %quantised.at, align 32
  %scale.at = getelementptr float, ptr %scales, i64 %g
  store float %scale, ptr %scale.at
  ; Of b, 128 more than there is may be multiplied: see `int8.py`.
  %signed = sext <32 x i8> %bytes to <32 x i32>
  %sum = call i32 @llvm.vector.reduce.add.v32i32(<32 x i32> %signed)
  %correction = mul i32 %sum, -128
  %correction.at = getelementptr i32, ptr %corrections, i64 %g
  store i32 %correction, ptr %correction.at
  %g.next = add i64 %g, 1
  %more = icmp ult i64 %g.next, %last
  br i1 %more, label %group, label %end
end:
  ret void
}

; Multiplies some panels with all rows.
define internal void @int8_panels(ptr %job, i64 %unit) {
entry:
  %job.value = load %Int8, ptr %job
  %quantised = extractvalue %Int8 %job.value, 2
  %scales = extractvalue %Int8 %job.value, 3
  %corrections = extractvalue %Int8 %job.value, 4
  %values = extractvalue %Int8 %job.value, 5
  %b.scales = extractvalue %Int8 %job.value, 6
  %y = extractvalue %Int8 %job.value, 7
  %M = extractvalue %Int8 %job.value, 8
  %groups = extractvalue %Int8 %job.value, 9
  %N = extractvalue %Int8 %job.value, 10
  %panels = extractvalue %Int8 %job.value, 11
  %unit.panels = extractvalue %Int8 %job.value, 12
  %first = mul i64 %unit, %unit.panels
  %behind = add i64 %first, %unit.panels
  %last = call i64 @llvm.umin.i64(i64 %behind, i64 %panels)
  %most = load i64, ptr @int8.rows
  %blocks = call i64 @quotient_up(i64 %M, i64 %most)
  %K = mul i64 %groups, 32
  %y.stride = mul i64 %N, 4
  %panel.bytes = mul i64 %groups, 1024
  %panel.scale.bytes = mul i64 %groups, 64
  %part = alloca [1024 x i8], align 64
  br label %panel
panel:
  %p = phi i64 [ %first, %entry ], [ %p.next, %panel.end ]
  %values.offset = mul i64 %p, %panel.bytes
  %values.panel = getelementptr i8, ptr %values, i64 %values.offset
  %b.scales.offset = mul i64 %p, %panel.scale.bytes
  %b.scales.panel = getelementptr i8, ptr %b.scales, i64 %b.scales.offset
  %column = mul i64 %p, 32
  %columns.left = sub i64 %N, %column
  %columns = call i64 @llvm.umin.i64(i64 %columns.left, i64 32)
  %bytes = mul i64 %columns, 4
  %is.whole = icmp eq i64 %columns, 32
  %y.panel = getelementptr float, ptr %y, i64 %column
  br label %block
block:
  %q = phi i64 [ 0, %panel ], [ %q.next, %block.end ]
  %m = phi i64 [ 0, %panel ], [ %m.next, %block.end ]
  %rows.left = sub i64 %M, %m
  %blocks.left = sub i64 %blocks, %q
  %rows = call i64 @quotient_up(i64 %rows.left, i64 %blocks.left)
  %rows.less = sub i64 %rows, 1
  %tile.at = getelementptr ptr, ptr @int8.tiles, i64 %rows.less
  %tile = load ptr, ptr %tile.at
  %a.offset = mul i64 %m, %K
  %a.block = getelementptr i8, ptr %quantised, i64 %a.offset
  %group.offset = mul i64 %m, %groups
  %scales.block = getelementptr float, ptr %scales, i64 %group.offset
  %corrections.block = getelementptr i32, ptr %corrections, i64 %group.offset
  %y.offset = mul i64 %m, %y.stride
  %y.block = getelementptr i8, ptr %y.panel, i64 %y.offset
  ; A tile has 32 columns, the last panel perhaps fewer.
  %to = select i1 %is.whole, ptr %y.block, ptr %part
  %to.stride = select i1 %is.whole, i64 %y.stride, i64 128
  call void %tile(ptr %a.block, ptr %scales.block, ptr %corrections.block, ptr %values.panel,
                  ptr %b.scales.panel, ptr %to, i64 %to.stride, i64 %groups)
  br i1 %is.whole, label %block.end, label %copy
copy:
  %r = phi i64 [ 0, %block ], [ %r.next, %copy ]
  %from.offset = mul i64 %r, 128
  %from.row = getelementptr i8, ptr %part, i64 %from.offset
  %y.row.offset = mul i64 %r, %y.stride
  %y.row = getelementptr i8, ptr %y.block, i64 %y.row.offset
  call void @llvm.memcpy.p0.p0.i64(ptr %y.row, ptr %from.row, i64 %bytes, i1 false)
  %r.next = add i64 %r, 1
  %more.rows = icmp ult i64 %r.next, %rows
  br i1 %more.rows, label %copy, label %block.end
block.end:
  %m.next = add i64 %m, %rows
  %q.next = add i64 %q, 1
  %more.blocks = icmp ult i64 %q.next, %blocks
  br i1 %more.blocks, label %block, label %panel.end
panel.end:
  %p.next = add i64 %p, 1
  %more.panels = icmp ult i64 %p.next, %last
  br i1 %more.panels, label %panel, label %end
end:
  ret void
}

; Does a job that `malloc` made, whose %parts rows or panels are shared among threads.
define internal ptr @int8_shared(ptr %frame, %Int8 %described, i64 %parts, i64 %threads, ptr %work) {
  %unit.parts = call i64 @unit(i64 %parts, i64 %threads)
  %units = call i64 @quotient_up(i64 %parts, i64 %unit.parts)
  %j.11 = insertvalue %Int8 %described, i64 %parts, 11
  %j.12 = insertvalue %Int8 %j.11, i64 %unit.parts, 12
  %job = call ptr @malloc(i64 136)
  store %Int8 %j.12, ptr %job
  %error = call ptr @shared(ptr %frame, ptr %job, i64 %units, ptr %work, i64 %threads)
  ret ptr %error
}

define internal ptr @int8(ptr %frame, ptr %kind, i64 %threads.most) {
entry:
  %described = call i1 @described(ptr %frame)
  br i1 %described, label %end, label %execute
end:
  ret ptr null
execute:
  %a.buffer = call ptr @argument(ptr %frame, i64 0)
  %values.buffer = call ptr @argument(ptr %frame, i64 1)
  %scales.buffer = call ptr @argument(ptr %frame, i64 2)
  %y.buffer = call ptr @result(ptr %frame)
  %a = call ptr @data(ptr %a.buffer)
  %values = call ptr @data(ptr %values.buffer)
  %b.scales = call ptr @data(ptr %scales.buffer)
  %y = call ptr @data(ptr %y.buffer)
  %M = call i64 @dim(ptr %y.buffer, i64 0)
  %N = call i64 @dim(ptr %y.buffer, i64 1)
  %panels = call i64 @dim(ptr %values.buffer, i64 0)
  %groups = call i64 @dim(ptr %scales.buffer, i64 1)
  %threads = call i64 @threads(ptr %frame, i64 %threads.most)
  %all.groups = mul i64 %M, %groups
  %value.bytes = mul i64 %all.groups, 32
  %scale.bytes = mul i64 %all.groups, 4
  %group.bytes = mul i64 %all.groups, 40
  %group.bytes.more = add i64 %group.bytes, 63
  %space.bytes = and i64 %group.bytes.more, -64
  %quantised = call ptr @aligned_alloc(i64 64, i64 %space.bytes)
  %scales = getelementptr i8, ptr %quantised, i64 %value.bytes
  %corrections = getelementptr i8, ptr %scales, i64 %scale.bytes
  %j.1 = insertvalue %Int8 zeroinitializer, ptr %a, 1
  %j.2 = insertvalue %Int8 %j.1, ptr %quantised, 2
  %j.3 = insertvalue %Int8 %j.2, ptr %scales, 3
  %j.4 = insertvalue %Int8 %j.3, ptr %corrections, 4
  %j.5 = insertvalue %Int8 %j.4, ptr %values, 5
  %j.6 = insertvalue %Int8 %j.5, ptr %b.scales, 6
  %j.7 = insertvalue %Int8 %j.6, ptr %y, 7
  %j.8 = insertvalue %Int8 %j.7, i64 %M, 8
  %j.9 = insertvalue %Int8 %j.8, i64 %groups, 9
  %j = insertvalue %Int8 %j.9, i64 %N, 10
  ; A few rows are quantised sooner than another thread is woken.
  %is.short = icmp ult i64 %all.groups, 1024
  %rows.threads = select i1 %is.short, i64 1, i64 %threads
  %error.rows = call ptr @int8_shared(ptr %frame, %Int8 %j, i64 %M, i64 %rows.threads, ptr @int8_rows)
  %error.panels = call ptr @int8_shared(ptr %frame, %Int8 %j, i64 %panels, i64 %threads, ptr @int8_panels)
  call void @free(ptr %quantised)
  %failed = icmp ne ptr %error.rows, null
  %error = select i1 %failed, ptr %error.rows, ptr %error.panels
  ret ptr %error
}
