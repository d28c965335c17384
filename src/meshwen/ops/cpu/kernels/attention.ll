; SPDX-License-Identifier: Apache-2.0
;
; Attention of tokens that follow one another over the part of the KV cache that each of them sees.
;
;   q float32 [B, K * G, T, H], scaled; keys [C, K, H, S] and values [C, K, S, H], both float32 or
;   both bfloat16; rows int32 [B], of the cache; starts int32 [B]; window int32 [1]; y as q.
;   H and S are multiples of 32.
;
; Token t of sequence b is at slot starts[b] + t, and sees up to `window` slots, its own the last.
;
; Slots are taken by passes of 512, whose scores stay in the nearest cache: scores, their exponentials
; less the largest so far (arXiv 1805.02867), then values, added with these weights. Passes, and the
; registers of 16 slots in them, begin at multiples of their size, and what a token does not see has
; the weight 0: so a token's result has the same bits whatever other tokens are attended to at once,
; as long as values are finite.

%Attention = type {
  %Job,
  ptr, ptr, ptr, ptr,      ; 1 q, 2 keys, 3 values, 4 y
  ptr, ptr, i64,           ; 5 rows, 6 starts, 7 window
  i64, i64, i64, i64, i64, ; 8 K, 9 G, 10 H, 11 S, 12 T
  i64, ptr                 ; 13 bytes of a number of keys and values, 14 tiles for them
}

; The slots of a pass, for all rows of a head.
%Pass = type {
  i64, i64, i64,           ; 0 begin, 1 H, 2 S
  ptr, ptr,                ; 3 keys from `begin` on, 4 the same, copied, or null
  ptr, i64, ptr,           ; 5 values of all slots, 6 bytes of a number, 7 tiles
  ptr, i64, i64            ; 8 room for scores, 9 window, 10 by how much the rows' slots differ
}

; What is known of a row of queries: the largest score so far, and the sum of the weights.
%Row = type { float, float }

declare float @llvm.maximum.f32(float, float)
declare float @llvm.vector.reduce.fmaximum.v16f32(<16 x float>)
declare float @llvm.vector.reduce.fadd.v16f32(float, <16 x float>)
declare i64 @llvm.smax.i64(i64, i64)

; Copies rows of 128 or of 64 bytes, one behind the other.
define internal void @copy_rows(ptr %to, ptr %from, i64 %stride, i64 %rows, i64 %bytes) {
entry:
  %whole = icmp eq i64 %bytes, 128
  br label %row
row:
  %r = phi i64 [ 0, %entry ], [ %r.next, %row.end ]
  %source = phi ptr [ %from, %entry ], [ %source.next, %row.end ]
  %target = phi ptr [ %to, %entry ], [ %target.next, %row.end ]
  %first = load <16 x i32>, ptr %source, align 2
  store <16 x i32> %first, ptr %target, align 64
  br i1 %whole, label %second, label %row.end
second:
  %source.second = getelementptr i8, ptr %source, i64 64
  %target.second = getelementptr i8, ptr %target, i64 64
  %line = load <16 x i32>, ptr %source.second, align 2
  store <16 x i32> %line, ptr %target.second, align 64
  br label %row.end
row.end:
  %source.next = getelementptr i8, ptr %source, i64 %stride
  %target.next = getelementptr i8, ptr %target, i64 %bytes
  %r.next = add i64 %r, 1
  %more = icmp ult i64 %r.next, %rows
  br i1 %more, label %row, label %end
end:
  ret void
}

define internal <16 x float> @all(float %x) alwaysinline {
  %one = insertelement <16 x float> poison, float %x, i32 0
  %all = shufflevector <16 x float> %one, <16 x float> poison, <16 x i32> zeroinitializer
  ret <16 x float> %all
}

; e^x for x up to 0, and NaN for NaN. Below e^-87 a float32 would be subnormal. Cephes' `expf`:
; n = x log2(e), rounded; r = x - n ln(2), in two steps; e^r = 1 + r + r^2 (c0 r^5 + ... + c5).
; 1.5 * 2^23 added to x log2(e) rounds it, and leaves n in the lowest bits of the sum. Those of a NaN,
; added to an exponent, could make a number of it. Above 0, where slots are not seen, the result means
; nothing.
define internal <16 x float> @exponential(<16 x float> %x.any) alwaysinline {
  %small = fcmp olt <16 x float> %x.any, splat (float -87.0)
  %x = select <16 x i1> %small, <16 x float> splat (float -87.0), <16 x float> %x.any
  %scaled = fmul <16 x float> %x, splat (float 0x3FF7154760000000)
  %n.above = fadd <16 x float> %scaled, splat (float 0x4168000000000000)
  %n = fsub <16 x float> %n.above, splat (float 0x4168000000000000)
  %r.0 = call <16 x float> @llvm.fma.v16f32(<16 x float> %n,
    <16 x float> splat (float 0xBFE6300000000000), <16 x float> %x)
  %r = call <16 x float> @llvm.fma.v16f32(<16 x float> %n,
    <16 x float> splat (float 0x3F2BD01060000000), <16 x float> %r.0)
  %p.1 = call <16 x float> @llvm.fma.v16f32(<16 x float> splat (float 0x3F2A0D2CE0000000),
    <16 x float> %r, <16 x float> splat (float 0x3F56E879C0000000))
  %p.2 = call <16 x float> @llvm.fma.v16f32(<16 x float> %p.1, <16 x float> %r,
    <16 x float> splat (float 0x3F81112100000000))
  %p.3 = call <16 x float> @llvm.fma.v16f32(<16 x float> %p.2, <16 x float> %r,
    <16 x float> splat (float 0x3FA5553820000000))
  %p.4 = call <16 x float> @llvm.fma.v16f32(<16 x float> %p.3, <16 x float> %r,
    <16 x float> splat (float 0x3FC5555540000000))
  %p.5 = call <16 x float> @llvm.fma.v16f32(<16 x float> %p.4, <16 x float> %r,
    <16 x float> splat (float 0x3FE0000000000000))
  %square = fmul <16 x float> %r, %r
  %near = call <16 x float> @llvm.fma.v16f32(<16 x float> %p.5, <16 x float> %square, <16 x float> %r)
  %e.r = fadd <16 x float> %near, splat (float 1.0)
  %n.bits = bitcast <16 x float> %n.above to <16 x i32>
  %exponent = shl <16 x i32> %n.bits, splat (i32 23)
  %e.bits = bitcast <16 x float> %e.r to <16 x i32>
  %y.bits = add <16 x i32> %e.bits, %exponent
  %y.number = bitcast <16 x i32> %y.bits to <16 x float>
  %is.nan = fcmp uno <16 x float> %x, %x
  %y = select <16 x i1> %is.nan, <16 x float> %x, <16 x float> %y.number
  ret <16 x float> %y
}

; Which of the 16 slots from `%slot` on are seen.
define internal <16 x i1> @seen(i64 %slot, i64 %first, i64 %last) alwaysinline {
  %from = sub i64 %first, %slot
  %to = sub i64 %last, %slot
  %from.32 = trunc i64 %from to i32
  %to.32 = trunc i64 %to to i32
  %from.one = insertelement <16 x i32> poison, i32 %from.32, i32 0
  %from.all = shufflevector <16 x i32> %from.one, <16 x i32> poison, <16 x i32> zeroinitializer
  %to.one = insertelement <16 x i32> poison, i32 %to.32, i32 0
  %to.all = shufflevector <16 x i32> %to.one, <16 x i32> poison, <16 x i32> zeroinitializer
  %after = icmp sle <16 x i32> %from.all, <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7,
    i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15>
  %before = icmp sge <16 x i32> %to.all, <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7,
    i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15>
  %seen = and <16 x i1> %after, %before
  ret <16 x i1> %seen
}

; Turns a row's scores of the slots `%from` to `%to` (multiples of 16) into weights. `%scores` is
; that of slot `%begin`. Returns what the row's result so far has to be multiplied by.
define internal float @weigh(ptr %scores, i64 %begin, i64 %from, i64 %to, i64 %first, i64 %last,
                             ptr %row) {
entry:
  br label %look
look:
  %s = phi i64 [ %from, %entry ], [ %s.next, %look ]
  %top = phi <16 x float> [ splat (float 0xC7EFFFFFE0000000), %entry ], [ %top.next, %look ]
  %offset = sub i64 %s, %begin
  %at = getelementptr float, ptr %scores, i64 %offset
  %score = load <16 x float>, ptr %at, align 4
  %seen = call <16 x i1> @seen(i64 %s, i64 %first, i64 %last)
  %score.seen = select <16 x i1> %seen, <16 x float> %score, <16 x float> splat (float 0xC7EFFFFFE0000000)
  ; A NaN may be lost here: its weight is NaN all the same.
  %higher = fcmp ogt <16 x float> %score.seen, %top
  %top.next = select <16 x i1> %higher, <16 x float> %score.seen, <16 x float> %top
  %s.next = add i64 %s, 16
  %more = icmp ult i64 %s.next, %to
  br i1 %more, label %look, label %maximum
maximum:
  %row.value = load %Row, ptr %row
  %largest.old = extractvalue %Row %row.value, 0
  %sum.old = extractvalue %Row %row.value, 1
  %largest.pass = call float @llvm.vector.reduce.fmaximum.v16f32(<16 x float> %top.next)
  %largest = call float @llvm.maximum.f32(float %largest.old, float %largest.pass)
  %largest.all = call <16 x float> @all(float %largest)
  br label %weight
weight:
  %w = phi i64 [ %from, %maximum ], [ %w.next, %weight ]
  %sum = phi <16 x float> [ zeroinitializer, %maximum ], [ %sum.next, %weight ]
  %w.offset = sub i64 %w, %begin
  %w.at = getelementptr float, ptr %scores, i64 %w.offset
  %w.score = load <16 x float>, ptr %w.at, align 4
  %less = fsub <16 x float> %w.score, %largest.all
  %exp = call <16 x float> @exponential(<16 x float> %less)
  %counts = call <16 x i1> @seen(i64 %w, i64 %first, i64 %last)
  %weight.seen = select <16 x i1> %counts, <16 x float> %exp, <16 x float> zeroinitializer
  store <16 x float> %weight.seen, ptr %w.at, align 4
  %sum.next = fadd <16 x float> %sum, %weight.seen
  %w.next = add i64 %w, 16
  %w.more = icmp ult i64 %w.next, %to
  br i1 %w.more, label %weight, label %end
end:
  %old.less = fsub float %largest.old, %largest
  %old.less.all = call <16 x float> @all(float %old.less)
  %scale.all = call <16 x float> @exponential(<16 x float> %old.less.all)
  %scale = extractelement <16 x float> %scale.all, i32 0
  %sum.scaled = fmul float %sum.old, %scale
  %sum.pass = call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, <16 x float> %sum.next)
  %sum.new = fadd float %sum.scaled, %sum.pass
  %row.0 = insertvalue %Row poison, float %largest, 0
  %row.1 = insertvalue %Row %row.0, float %sum.new, 1
  store %Row %row.1, ptr %row
  ret float %scale
}

define internal void @scale(ptr %y, i64 %H, float %by) {
entry:
  %all = call <16 x float> @all(float %by)
  br label %some
some:
  %d = phi i64 [ 0, %entry ], [ %d.next, %some ]
  %at = getelementptr float, ptr %y, i64 %d
  %old = load <16 x float>, ptr %at, align 4
  %new = fmul <16 x float> %old, %all
  store <16 x float> %new, ptr %at, align 4
  %d.next = add i64 %d, 16
  %more = icmp ult i64 %d.next, %H
  br i1 %more, label %some, label %end
end:
  ret void
}

define internal void @divide(ptr %y, i64 %H, float %by) {
entry:
  %all = call <16 x float> @all(float %by)
  br label %some
some:
  %d = phi i64 [ 0, %entry ], [ %d.next, %some ]
  %at = getelementptr float, ptr %y, i64 %d
  %old = load <16 x float>, ptr %at, align 4
  %new = fdiv <16 x float> %old, %all
  store <16 x float> %new, ptr %at, align 4
  %d.next = add i64 %d, 16
  %more = icmp ult i64 %d.next, %H
  br i1 %more, label %some, label %end
end:
  ret void
}

; Adds the slots of a pass to up to 12 rows of queries, the first of which is at slot `%slot`.
define internal void @block(ptr %pass, ptr %q, ptr %y, ptr %states, i64 %rows, i64 %slot) {
entry:
  %pass.value = load %Pass, ptr %pass
  %begin = extractvalue %Pass %pass.value, 0
  %H = extractvalue %Pass %pass.value, 1
  %S = extractvalue %Pass %pass.value, 2
  %keys = extractvalue %Pass %pass.value, 3
  %copied = extractvalue %Pass %pass.value, 4
  %values = extractvalue %Pass %pass.value, 5
  %element = extractvalue %Pass %pass.value, 6
  %tiles = extractvalue %Pass %pass.value, 7
  %scores = extractvalue %Pass %pass.value, 8
  %window = extractvalue %Pass %pass.value, 9
  %differ = extractvalue %Pass %pass.value, 10
  %rows.less = sub i64 %rows, 1
  %end.pass = add i64 %begin, 512
  %last.row = mul i64 %rows.less, %differ
  %last = add i64 %slot, %last.row
  %end.seen = add i64 %last, 1
  %end = call i64 @llvm.umin.i64(i64 %end.seen, i64 %end.pass)
  %first.block = call i64 @first(i64 %slot, i64 %window)
  %from = call i64 @llvm.umax.i64(i64 %first.block, i64 %begin)
  %none = icmp uge i64 %from, %end
  br i1 %none, label %done, label %score
score:
  %from.panel = and i64 %from, -32
  %tile.at = getelementptr ptr, ptr %tiles, i64 %rows.less
  %tile = load ptr, ptr %tile.at
  %H.bytes = mul i64 %H, 4
  %S.bytes = mul i64 %S, %element
  %panel.bytes = mul i64 %element, 32
  %copies = icmp ne ptr %copied, null
  %key.stride = select i1 %copies, i64 %panel.bytes, i64 %S.bytes
  %key.ahead = select i1 %copies, i64 0, i64 %S.bytes
  br label %panel
panel:
  %j = phi i64 [ %from.panel, %score ], [ %j.next, %panel.end ]
  %j.offset = sub i64 %j, %begin
  %j.bytes = mul i64 %j.offset, %element
  %key.direct = getelementptr i8, ptr %keys, i64 %j.bytes
  %j.copied = mul i64 %j.bytes, %H
  %key.copied = getelementptr i8, ptr %copied, i64 %j.copied
  %key = select i1 %copies, ptr %key.copied, ptr %key.direct
  %key.next = getelementptr i8, ptr %key, i64 %panel.bytes
  %scores.j = getelementptr float, ptr %scores, i64 %j.offset
  br label %dimension
dimension:
  ; Scores are large beside what tells them apart, so sums are kept short.
  %h = phi i64 [ 0, %panel ], [ %h.next, %dimension ]
  %q.h = getelementptr float, ptr %q, i64 %h
  %h.offset = mul i64 %h, %key.stride
  %key.h = getelementptr i8, ptr %key, i64 %h.offset
  %h.ahead = mul i64 %h, %key.ahead
  %key.next.h = getelementptr i8, ptr %key.next, i64 %h.ahead
  %h.none = icmp eq i64 %h, 0
  %before = select i1 %h.none, ptr @nothing, ptr %scores.j
  %before.stride = select i1 %h.none, i64 0, i64 2048
  call void %tile(ptr %q.h, i64 %H.bytes, ptr %key.h, i64 %key.stride, ptr %before,
                    i64 %before.stride, ptr %scores.j, i64 2048, i64 16, ptr %key.next.h,
                    i64 %key.ahead, i64 0)
  %h.next = add i64 %h, 16
  %more.dimensions.q = icmp ult i64 %h.next, %H
  br i1 %more.dimensions.q, label %dimension, label %panel.end
panel.end:
  %j.next = add i64 %j, 32
  %more.panels = icmp ult i64 %j.next, %end
  br i1 %more.panels, label %panel, label %rows.begin
rows.begin:
  %to.up = add i64 %end, 15
  %to = and i64 %to.up, -16
  %from.16 = and i64 %from, -16
  %pass.first = and i64 %first.block, -512
  %is.first = icmp eq i64 %pass.first, %begin
  br label %row
row:
  %r = phi i64 [ 0, %rows.begin ], [ %r.next, %row.end ]
  %r.slots = mul i64 %r, %differ
  %r.last = add i64 %slot, %r.slots
  %r.first = call i64 @first(i64 %r.last, i64 %window)
  %r.scores.offset = mul i64 %r, 512
  %r.scores = getelementptr float, ptr %scores, i64 %r.scores.offset
  %r.state = getelementptr %Row, ptr %states, i64 %r
  %by = call float @weigh(ptr %r.scores, i64 %begin, i64 %from.16, i64 %to, i64 %r.first,
                          i64 %r.last, ptr %r.state)
  br i1 %is.first, label %row.end, label %row.scale
row.scale:
  %r.y.offset = mul i64 %r, %H
  %r.y = getelementptr float, ptr %y, i64 %r.y.offset
  call void @scale(ptr %r.y, i64 %H, float %by)
  br label %row.end
row.end:
  %r.next = add i64 %r, 1
  %more.rows = icmp ult i64 %r.next, %rows
  br i1 %more.rows, label %row, label %values.begin
values.begin:
  %steps = sub i64 %end, %from
  %from.offset = sub i64 %from, %begin
  %weights = getelementptr float, ptr %scores, i64 %from.offset
  %value.stride = mul i64 %H, %element
  %from.bytes = mul i64 %from, %value.stride
  %values.from = getelementptr i8, ptr %values, i64 %from.bytes
  %soon = mul i64 %value.stride, 16
  br label %dimensions
dimensions:
  %d = phi i64 [ 0, %values.begin ], [ %d.next, %dimensions ]
  %d.bytes = mul i64 %d, %element
  %values.d = getelementptr i8, ptr %values.from, i64 %d.bytes
  %values.soon = getelementptr i8, ptr %values.d, i64 %soon
  %y.d = getelementptr float, ptr %y, i64 %d
  %x = select i1 %is.first, ptr @nothing, ptr %y.d
  %x.stride = select i1 %is.first, i64 0, i64 %H.bytes
  call void %tile(ptr %weights, i64 2048, ptr %values.d, i64 %value.stride, ptr %x, i64 %x.stride,
                    ptr %y.d, i64 %H.bytes, i64 %steps, ptr %values.soon, i64 %value.stride,
                    i64 0)
  %d.next = add i64 %d, 32
  %more.dimensions = icmp ult i64 %d.next, %H
  br i1 %more.dimensions, label %dimensions, label %done
done:
  ret void
}

; The first slot that a token sees.
define internal i64 @first(i64 %slot, i64 %window) {
  %behind = add i64 %slot, 1
  %first.any = sub i64 %behind, %window
  %first = call i64 @llvm.smax.i64(i64 %first.any, i64 0)
  ret i64 %first
}

; Copies the keys of up to 512 slots: panels of 32, one behind the other.
define internal void @copy_keys(ptr %to, ptr %keys, i64 %begin, i64 %end, i64 %H, i64 %S,
                                i64 %element) {
entry:
  %S.bytes = mul i64 %S, %element
  %row.bytes = mul i64 %element, 32
  %panel.bytes = mul i64 %H, %row.bytes
  br label %panel
panel:
  %j = phi i64 [ %begin, %entry ], [ %j.next, %panel ]
  %target = phi ptr [ %to, %entry ], [ %target.next, %panel ]
  %j.bytes = mul i64 %j, %element
  %source = getelementptr i8, ptr %keys, i64 %j.bytes
  call void @copy_rows(ptr %target, ptr %source, i64 %S.bytes, i64 %H, i64 %row.bytes)
  %target.next = getelementptr i8, ptr %target, i64 %panel.bytes
  %j.next = add i64 %j, 32
  %more = icmp ult i64 %j.next, %end
  br i1 %more, label %panel, label %done
done:
  ret void
}

; The unit of work: all queries of a key/value head, of single tokens; else all tokens of a query
; head.
define internal void @head(ptr %job, i64 %unit) {
entry:
  %pass = alloca %Pass
  %job.value = load %Attention, ptr %job
  %q = extractvalue %Attention %job.value, 1
  %keys = extractvalue %Attention %job.value, 2
  %values = extractvalue %Attention %job.value, 3
  %y = extractvalue %Attention %job.value, 4
  %rows = extractvalue %Attention %job.value, 5
  %starts = extractvalue %Attention %job.value, 6
  %window = extractvalue %Attention %job.value, 7
  %K = extractvalue %Attention %job.value, 8
  %G = extractvalue %Attention %job.value, 9
  %H = extractvalue %Attention %job.value, 10
  %S = extractvalue %Attention %job.value, 11
  %T = extractvalue %Attention %job.value, 12
  %element = extractvalue %Attention %job.value, 13
  %tiles = extractvalue %Attention %job.value, 14
  %single = icmp eq i64 %T, 1
  %groups = select i1 %single, i64 1, i64 %G
  %length = select i1 %single, i64 %G, i64 %T
  %differ = select i1 %single, i64 0, i64 1
  %kv = udiv i64 %unit, %groups
  %b = udiv i64 %kv, %K
  %k = urem i64 %kv, %K
  %row.at = getelementptr i32, ptr %rows, i64 %b
  %row.32 = load i32, ptr %row.at
  %row = zext i32 %row.32 to i64
  %start.at = getelementptr i32, ptr %starts, i64 %b
  %start.32 = load i32, ptr %start.at
  %start = zext i32 %start.32 to i64
  %row.heads = mul i64 %row, %K
  %head = add i64 %row.heads, %k
  %SH = mul i64 %S, %H
  %head.offset = mul i64 %head, %SH
  %head.bytes = mul i64 %head.offset, %element
  %keys.head = getelementptr i8, ptr %keys, i64 %head.bytes
  %values.head = getelementptr i8, ptr %values, i64 %head.bytes
  %unit.size = mul i64 %length, %H
  %q.offset = mul i64 %unit, %unit.size
  %q.head = getelementptr float, ptr %q, i64 %q.offset
  %y.head = getelementptr float, ptr %y, i64 %q.offset
  %blocks = call i64 @quotient_up(i64 %length, i64 12)
  %copies = icmp ugt i64 %blocks, 1
  ; Room for scores [12, 512], for keys [512, H] where they are copied, for the rows' states.
  %keys.numbers = mul i64 %H, 512
  %keys.bytes = mul i64 %keys.numbers, %element
  %copied.bytes = select i1 %copies, i64 %keys.bytes, i64 0
  %states.bytes.any = mul i64 %length, 8
  %states.bytes.up = add i64 %states.bytes.any, 63
  %states.bytes = and i64 %states.bytes.up, -64
  %space.1 = add i64 %copied.bytes, 24576
  %space.bytes = add i64 %space.1, %states.bytes
  %scores = call ptr @aligned_alloc(i64 64, i64 %space.bytes)
  %space.copied = getelementptr i8, ptr %scores, i64 24576
  %states = getelementptr i8, ptr %space.copied, i64 %copied.bytes
  %copied = select i1 %copies, ptr %space.copied, ptr null
  %pass.1 = insertvalue %Pass poison, i64 %H, 1
  %pass.2 = insertvalue %Pass %pass.1, i64 %S, 2
  %pass.4 = insertvalue %Pass %pass.2, ptr %copied, 4
  %pass.5 = insertvalue %Pass %pass.4, ptr %values.head, 5
  %pass.6 = insertvalue %Pass %pass.5, i64 %element, 6
  %pass.7 = insertvalue %Pass %pass.6, ptr %tiles, 7
  %pass.8 = insertvalue %Pass %pass.7, ptr %scores, 8
  %pass.9 = insertvalue %Pass %pass.8, i64 %window, 9
  %pass.10 = insertvalue %Pass %pass.9, i64 %differ, 10
  %length.less = sub i64 %length, 1
  %last.row = mul i64 %length.less, %differ
  %last = add i64 %start, %last.row
  %end = add i64 %last, 1
  %first = call i64 @first(i64 %start, i64 %window)
  %begin.first = and i64 %first, -512
  br label %state
state:
  %i = phi i64 [ 0, %entry ], [ %i.next, %state ]
  %state.at = getelementptr %Row, ptr %states, i64 %i
  store %Row { float 0xC7EFFFFFE0000000, float 0.0 }, ptr %state.at
  %i.next = add i64 %i, 1
  %more.states = icmp ult i64 %i.next, %length
  br i1 %more.states, label %state, label %slots
slots:
  %begin = phi i64 [ %begin.first, %state ], [ %begin.next, %slots.end ]
  %begin.next = add i64 %begin, 512
  %begin.bytes = mul i64 %begin, %element
  %keys.begin = getelementptr i8, ptr %keys.head, i64 %begin.bytes
  %pass.0 = insertvalue %Pass %pass.10, i64 %begin, 0
  %pass.3 = insertvalue %Pass %pass.0, ptr %keys.begin, 3
  store %Pass %pass.3, ptr %pass
  br i1 %copies, label %copy, label %blocks.begin
copy:
  %copy.end = call i64 @llvm.umin.i64(i64 %begin.next, i64 %end)
  call void @copy_keys(ptr %copied, ptr %keys.head, i64 %begin, i64 %copy.end, i64 %H, i64 %S,
                       i64 %element)
  br label %blocks.begin
blocks.begin:
  br label %block
block:
  %n = phi i64 [ 0, %blocks.begin ], [ %n.next, %block ]
  %m = phi i64 [ 0, %blocks.begin ], [ %m.next, %block ]
  %rows.left = sub i64 %length, %m
  %blocks.left = sub i64 %blocks, %n
  %block.rows = call i64 @quotient_up(i64 %rows.left, i64 %blocks.left)
  %m.offset = mul i64 %m, %H
  %q.block = getelementptr float, ptr %q.head, i64 %m.offset
  %y.block = getelementptr float, ptr %y.head, i64 %m.offset
  %states.block = getelementptr %Row, ptr %states, i64 %m
  %m.slots = mul i64 %m, %differ
  %slot = add i64 %start, %m.slots
  call void @block(ptr %pass, ptr %q.block, ptr %y.block, ptr %states.block, i64 %block.rows, i64 %slot)
  %m.next = add i64 %m, %block.rows
  %n.next = add i64 %n, 1
  %more.blocks = icmp ult i64 %n.next, %blocks
  br i1 %more.blocks, label %block, label %slots.end
slots.end:
  %more.slots = icmp ult i64 %begin.next, %end
  br i1 %more.slots, label %slots, label %mean
mean:
  %r = phi i64 [ 0, %slots.end ], [ %r.next, %mean ]
  %r.offset = mul i64 %r, %H
  %y.row = getelementptr float, ptr %y.head, i64 %r.offset
  %sum.at = getelementptr %Row, ptr %states, i64 %r, i32 1
  %sum = load float, ptr %sum.at
  call void @divide(ptr %y.row, i64 %H, float %sum)
  %r.next = add i64 %r, 1
  %more.rows = icmp ult i64 %r.next, %length
  br i1 %more.rows, label %mean, label %done
done:
  call void @free(ptr %scores)
  ret void
}

define internal ptr @attention(ptr %frame, ptr %kind, i64 %threads.most) {
entry:
  %described = call i1 @described(ptr %frame)
  br i1 %described, label %end, label %execute
end:
  ret ptr null
execute:
  %q.buffer = call ptr @argument(ptr %frame, i64 0)
  %keys.buffer = call ptr @argument(ptr %frame, i64 1)
  %values.buffer = call ptr @argument(ptr %frame, i64 2)
  %rows.buffer = call ptr @argument(ptr %frame, i64 3)
  %starts.buffer = call ptr @argument(ptr %frame, i64 4)
  %window.buffer = call ptr @argument(ptr %frame, i64 5)
  %y.buffer = call ptr @result(ptr %frame)
  %q = call ptr @data(ptr %q.buffer)
  %keys = call ptr @data(ptr %keys.buffer)
  %values = call ptr @data(ptr %values.buffer)
  %rows = call ptr @data(ptr %rows.buffer)
  %starts = call ptr @data(ptr %starts.buffer)
  %window.at = call ptr @data(ptr %window.buffer)
  %window.32 = load i32, ptr %window.at
  %window = zext i32 %window.32 to i64
  %y = call ptr @data(ptr %y.buffer)
  %B = call i64 @dim(ptr %q.buffer, i64 0)
  %N = call i64 @dim(ptr %q.buffer, i64 1)
  %T = call i64 @dim(ptr %q.buffer, i64 2)
  %K = call i64 @dim(ptr %keys.buffer, i64 1)
  %H = call i64 @dim(ptr %keys.buffer, i64 2)
  %S = call i64 @dim(ptr %keys.buffer, i64 3)
  %G = udiv i64 %N, %K
  %kind.value = load %Kind, ptr %kind
  %element = extractvalue %Kind %kind.value, 0
  %tiles = extractvalue %Kind %kind.value, 3
  %single = icmp eq i64 %T, 1
  %heads = select i1 %single, i64 %K, i64 %N
  %units = mul i64 %B, %heads
  %job = call ptr @malloc(i64 152)
  %j.1 = insertvalue %Attention zeroinitializer, ptr %q, 1
  %j.2 = insertvalue %Attention %j.1, ptr %keys, 2
  %j.3 = insertvalue %Attention %j.2, ptr %values, 3
  %j.4 = insertvalue %Attention %j.3, ptr %y, 4
  %j.5 = insertvalue %Attention %j.4, ptr %rows, 5
  %j.6 = insertvalue %Attention %j.5, ptr %starts, 6
  %j.7 = insertvalue %Attention %j.6, i64 %window, 7
  %j.8 = insertvalue %Attention %j.7, i64 %K, 8
  %j.9 = insertvalue %Attention %j.8, i64 %G, 9
  %j.10 = insertvalue %Attention %j.9, i64 %H, 10
  %j.11 = insertvalue %Attention %j.10, i64 %S, 11
  %j.12 = insertvalue %Attention %j.11, i64 %T, 12
  %j.13 = insertvalue %Attention %j.12, i64 %element, 13
  %j.14 = insertvalue %Attention %j.13, ptr %tiles, 14
  store %Attention %j.14, ptr %job
  %threads = call i64 @threads(ptr %frame, i64 %threads.most)
  %error = call ptr @shared(ptr %frame, ptr %job, i64 %units, ptr @head, i64 %threads)
  ret ptr %error
}
