; SPDX-License-Identifier: Apache-2.0
;
; The matrix product y = a b: a [M, K], b [K, N], y [M, N] float32, with N >= 32. `tiles.py` adds the
; tiles of each kind of product, of 32 columns and up to 12 rows, and tables of them by rows - 1. A step
; of a tile takes 4 bytes of a row of a.
;
; A panel is multiplied with all rows of a, up to 12 at a time: columns of b that are 128 bytes wide,
; one or two narrow tiles; or for few rows, one wide tile. Memory decides the speed of few rows: a line
; of the cache that is read by itself takes longer than neighbours do. For more than 12 rows a panel is
; copied, by chunks that stay in the nearest cache: in b its rows are so far apart that they displace
; one another. Up to `@streamed.rows` rows are streamed: a panel is then many columns wide.

; Bytes of a number of b, rows of b a step, tables of narrow tiles, of wide ones, of streams, and of
; tiles for copies; bytes of a number of a copy, void pack(to, from, stride, rows).
%Kind = type { i64, i64, ptr, ptr, ptr, ptr, i64, ptr }

%Product = type {
  %Job,
  ptr, ptr, ptr,     ; 1 a, 2 b, 3 y
  i64, i64, i64,     ; 4 rows, 5 steps, 6 columns
  ptr, ptr,          ; 7 kind, 8 tiles
  i64, i64,          ; 9 panels, 10 panels a unit
  i64, i64, i64      ; 11 columns of a panel, 12 tiles that they are, 13 whether it is copied
}

@nothing = internal constant [512 x i8] zeroinitializer, align 64

declare ptr @aligned_alloc(i64, i64)

define internal i64 @quotient_up(i64 %a, i64 %b) {
  %a.less = sub i64 %a, 1
  %sum = add i64 %a.less, %b
  %quotient = udiv i64 %sum, %b
  ret i64 %quotient
}

; Copies a chunk of a panel: rows of 128 bytes, one behind the other.
define internal void @pack(ptr %to, ptr %from, i64 %stride, i64 %rows) {
entry:
  br label %row
row:
  %r = phi i64 [ 0, %entry ], [ %r.next, %row ]
  %source = phi ptr [ %from, %entry ], [ %source.next, %row ]
  %target = phi ptr [ %to, %entry ], [ %target.next, %row ]
  %line = load <32 x i32>, ptr %source, align 2
  store <32 x i32> %line, ptr %target, align 64
  %source.next = getelementptr i8, ptr %source, i64 %stride
  %target.next = getelementptr i8, ptr %target, i64 128
  %r.next = add i64 %r, 1
  %more = icmp ult i64 %r.next, %rows
  br i1 %more, label %row, label %end
end:
  ret void
}

; The same of rows of 32 bfloat16, as float32.
define internal void @pack_as_float32(ptr %to, ptr %from, i64 %stride, i64 %rows) {
entry:
  br label %row
row:
  %r = phi i64 [ 0, %entry ], [ %r.next, %row ]
  %source = phi ptr [ %from, %entry ], [ %source.next, %row ]
  %target = phi ptr [ %to, %entry ], [ %target.next, %row ]
  %short = load <32 x i16>, ptr %source, align 2
  %long = zext <32 x i16> %short to <32 x i32>
  %bits = shl <32 x i32> %long, splat (i32 16)
  store <32 x i32> %bits, ptr %target, align 64
  %source.next = getelementptr i8, ptr %source, i64 %stride
  %target.next = getelementptr i8, ptr %target, i64 128
  %r.next = add i64 %r, 1
  %more = icmp ult i64 %r.next, %rows
  br i1 %more, label %row, label %end
end:
  ret void
}

; All rows of a panel. Chunks of 128 steps are summed by themselves, then added up: in float32 that
; is several times as accurate as one long sum. The last panel ends with the last column: where it
; overlaps the one before, both write the same numbers. `%space` has room for a chunk and for the sums
; of all rows.
define internal void @panel(ptr %job, i64 %p, ptr %space) {
entry:
  %job.value = load %Product, ptr %job
  %a = extractvalue %Product %job.value, 1
  %b = extractvalue %Product %job.value, 2
  %y = extractvalue %Product %job.value, 3
  %M = extractvalue %Product %job.value, 4
  %steps = extractvalue %Product %job.value, 5
  %N = extractvalue %Product %job.value, 6
  %kind = extractvalue %Product %job.value, 7
  %tiles = extractvalue %Product %job.value, 8
  %width = extractvalue %Product %job.value, 11
  %parts = extractvalue %Product %job.value, 12
  %packs.64 = extractvalue %Product %job.value, 13
  %packs = trunc i64 %packs.64 to i1
  %kind.value = load %Kind, ptr %kind
  %element = extractvalue %Kind %kind.value, 0
  %depth = extractvalue %Kind %kind.value, 1
  %pack = extractvalue %Kind %kind.value, 7
  %column.even = mul i64 %p, %width
  %column.last = sub i64 %N, %width
  %column = call i64 @llvm.umin.i64(i64 %column.even, i64 %column.last)
  %b.offset = mul i64 %column, %element
  %b.panel = getelementptr i8, ptr %b, i64 %b.offset
  %y.panel = getelementptr float, ptr %y, i64 %column
  %a.stride = mul i64 %steps, 4
  %b.stride = mul i64 %N, %element
  %y.stride = mul i64 %N, 4
  %panel.bytes = mul i64 %width, %element
  %part.bytes = udiv i64 %panel.bytes, %parts
  %panels = udiv i64 %width, 32
  %tile.panels = udiv i64 %panels, %parts
  %sums.stride = mul i64 %width, 4
  %blocks = call i64 @quotient_up(i64 %M, i64 12)
  %wide.rows = load i64, ptr @wide.rows
  %is.wide = icmp ule i64 %M, %wide.rows
  %sums = getelementptr i8, ptr %space, i64 32768
  %soon.offset = mul i64 %b.stride, 16
  br label %chunk
chunk:
  %k = phi i64 [ 0, %entry ], [ %k.next, %chunk.end ]
  %k.row = mul i64 %k, %depth
  %k.offset = mul i64 %k.row, %b.stride
  %b.chunk = getelementptr i8, ptr %b.panel, i64 %k.offset
  %soon = getelementptr i8, ptr %b.chunk, i64 %soon.offset
  %steps.left = sub i64 %steps, %k
  %chunk.steps = call i64 @llvm.umin.i64(i64 128, i64 %steps.left)
  %k.next = add i64 %k, %chunk.steps
  %is.first = icmp eq i64 %k, 0
  %is.last = icmp eq i64 %k.next, %steps
  ; What is multiplied next: the rows below, or of the panel to the right. A wide tile goes through
  ; memory so fast that what it needs itself is fetched: rows further down.
  %below.row = mul i64 %k.next, %depth
  %below.offset = mul i64 %below.row, %b.stride
  %below = getelementptr i8, ptr %b.panel, i64 %below.offset
  %right = getelementptr i8, ptr %b.panel, i64 %panel.bytes
  %ahead.packed = select i1 %is.last, ptr %right, ptr %below
  %ahead.chunk = select i1 %is.wide, ptr %soon, ptr %ahead.packed
  br i1 %packs, label %copy, label %ready
copy:
  %chunk.rows = mul i64 %chunk.steps, %depth
  call void %pack(ptr %space, ptr %b.chunk, i64 %b.stride, i64 %chunk.rows)
  br label %ready
ready:
  %b.tile = phi ptr [ %b.chunk, %chunk ], [ %space, %copy ]
  %b.tile.stride = phi i64 [ %b.stride, %chunk ], [ 128, %copy ]
  %a.offset.k = mul i64 %k, 4
  %a.chunk = getelementptr i8, ptr %a, i64 %a.offset.k
  br label %block
block:
  %q = phi i64 [ 0, %ready ], [ %q.next, %block.end ]
  %m = phi i64 [ 0, %ready ], [ %m.next, %block.end ]
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
  %to = select i1 %is.last, ptr %y.block, ptr %sums.block
  %to.stride = select i1 %is.last, i64 %y.stride, i64 %sums.stride
  %fetches = icmp eq i64 %q, 0
  br label %part
part:
  %h = phi i64 [ 0, %block ], [ %h.next, %part ]
  %b.part.offset = mul i64 %h, %part.bytes
  %b.part = getelementptr i8, ptr %b.tile, i64 %b.part.offset
  %part.offset = mul i64 %h, 128
  %from.part.offset = select i1 %is.first, i64 0, i64 %part.offset
  %from.part = getelementptr i8, ptr %from, i64 %from.part.offset
  %to.part = getelementptr i8, ptr %to, i64 %part.offset
  ; Each part of the first block fetches its share of the rows.
  %share.row = mul i64 %h, %chunk.steps
  %share.offset = mul i64 %share.row, %b.stride
  %ahead.share = getelementptr i8, ptr %ahead.chunk, i64 %share.offset
  %is.share = icmp ult i64 %h, %depth
  %ahead.any = and i1 %fetches, %is.share
  %ahead = select i1 %ahead.any, ptr %ahead.share, ptr %b.tile
  %ahead.stride = select i1 %ahead.any, i64 %b.stride, i64 0
  call void %tile(ptr %a.block, i64 %a.stride, ptr %b.part, i64 %b.tile.stride,
                  ptr %from.part, i64 %from.stride, ptr %to.part, i64 %to.stride, i64 %chunk.steps,
                  ptr %ahead, i64 %ahead.stride, i64 %tile.panels)
  %h.next = add i64 %h, 1
  %more.parts = icmp ult i64 %h.next, %parts
  br i1 %more.parts, label %part, label %block.end
block.end:
  %m.next = add i64 %m, %rows
  %q.next = add i64 %q, 1
  %more = icmp ult i64 %q.next, %blocks
  br i1 %more, label %block, label %chunk.end
chunk.end:
  br i1 %is.last, label %end, label %chunk
end:
  ret void
}

define internal void @panels(ptr %job, i64 %unit) {
entry:
  %job.value = load %Product, ptr %job
  %M = extractvalue %Product %job.value, 4
  %panels = extractvalue %Product %job.value, 9
  %unit.panels = extractvalue %Product %job.value, 10
  %width = extractvalue %Product %job.value, 11
  %first = mul i64 %unit, %unit.panels
  %behind = add i64 %first, %unit.panels
  %last = call i64 @llvm.umin.i64(i64 %behind, i64 %panels)
  %row.bytes = mul i64 %width, 4
  %sums.bytes = mul i64 %M, %row.bytes
  %space.any = add i64 %sums.bytes, 32768
  %space.more = add i64 %space.any, 63
  %space.bytes = and i64 %space.more, -64
  %space = call ptr @aligned_alloc(i64 64, i64 %space.bytes)
  br label %panel
panel:
  %p = phi i64 [ %first, %entry ], [ %p.next, %panel ]
  call void @panel(ptr %job, i64 %p, ptr %space)
  %p.next = add i64 %p, 1
  %more = icmp ult i64 %p.next, %last
  br i1 %more, label %panel, label %end
end:
  call void @free(ptr %space)
  ret void
}

; Columns of a stream: so many at most, 256 at least, and so that all threads get as many panels.
define internal i64 @even(i64 %N, i64 %most, i64 %threads) {
  %panels.least = call i64 @quotient_up(i64 %N, i64 %most)
  %rounds = call i64 @quotient_up(i64 %panels.least, i64 %threads)
  %panels = mul i64 %rounds, %threads
  %columns = call i64 @quotient_up(i64 %N, i64 %panels)
  %columns.long = call i64 @llvm.umax.i64(i64 %columns, i64 256)
  %pieces = call i64 @quotient_up(i64 %columns.long, i64 32)
  %pieces.whole = udiv i64 %N, 32
  %pieces.least = call i64 @llvm.umin.i64(i64 %pieces, i64 %pieces.whole)
  %even = mul i64 %pieces.least, 32
  ret i64 %even
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
  %M = call i64 @dim(ptr %a.buffer, i64 0)
  %K = call i64 @dim(ptr %b.buffer, i64 0)
  %N = call i64 @dim(ptr %b.buffer, i64 1)
  %kind.value = load %Kind, ptr %kind
  %element = extractvalue %Kind %kind.value, 0
  %depth = extractvalue %Kind %kind.value, 1
  %narrow = extractvalue %Kind %kind.value, 2
  %wide = extractvalue %Kind %kind.value, 3
  %streams = extractvalue %Kind %kind.value, 4
  %packed = extractvalue %Kind %kind.value, 5
  %packed.element = extractvalue %Kind %kind.value, 6
  %steps = udiv i64 %K, %depth
  %threads = call i64 @threads(ptr %frame, i64 %threads.most)
  %streamed.rows = load i64, ptr @streamed.rows
  %is.streamed = icmp ule i64 %M, %streamed.rows
  %wide.rows = load i64, ptr @wide.rows
  %few = icmp ule i64 %M, %wide.rows
  br i1 %is.streamed, label %stream, label %tile
stream:
  ; Their sums have to stay in the nearest cache: 24 KiB.
  %rows = call i64 @llvm.umin.i64(i64 %M, i64 12)
  %most.any = udiv i64 6144, %rows
  %longest = load i64, ptr @longest
  %most = call i64 @llvm.umin.i64(i64 %most.any, i64 %longest)
  %width.stream = call i64 @even(i64 %N, i64 %most, i64 %threads)
  br label %ready
tile:
  br i1 %few, label %look, label %choose
look:
  %M.less = sub i64 %M, 1
  %width.at = getelementptr i64, ptr @widths, i64 %M.less
  %width.panels = load i64, ptr %width.at
  %width.columns = mul i64 %width.panels, 32
  %fits = icmp ule i64 %width.columns, %N
  %width.look = select i1 %fits, i64 %width.columns, i64 32
  %tiles.look = select i1 %fits, ptr %wide, ptr %narrow
  br label %ready
choose:
  %many = icmp ugt i64 %M, 12
  %usual.element = select i1 %many, i64 %packed.element, i64 %element
  %usual = udiv i64 128, %usual.element
  %enough = icmp ule i64 %usual, %N
  %width.choose = select i1 %enough, i64 %usual, i64 32
  %packs = and i1 %many, %enough
  %tiles.choose = select i1 %packs, ptr %packed, ptr %narrow
  %parts.choose = udiv i64 %width.choose, 32
  br label %ready
ready:
  %width = phi i64 [ %width.stream, %stream ], [ %width.look, %look ], [ %width.choose, %choose ]
  %tiles = phi ptr [ %streams, %stream ], [ %tiles.look, %look ], [ %tiles.choose, %choose ]
  %parts.in = phi i64 [ 1, %stream ], [ 1, %look ], [ %parts.choose, %choose ]
  %copies = phi i1 [ 0, %stream ], [ 0, %look ], [ %packs, %choose ]
  %copies.64 = zext i1 %copies to i64
  %panels = call i64 @quotient_up(i64 %N, i64 %width)
  ; Neighbours, of which one is fetched while the other is summed; but a few units a thread, so that
  ; one that comes late holds up nothing.
  %parts = mul i64 %threads, 4
  %unit.panels = call i64 @quotient_up(i64 %panels, i64 %parts)
  %units = call i64 @quotient_up(i64 %panels, i64 %unit.panels)
  %job = call ptr @malloc(i64 144)
  %j.1 = insertvalue %Product zeroinitializer, ptr %a, 1
  %j.2 = insertvalue %Product %j.1, ptr %b, 2
  %j.3 = insertvalue %Product %j.2, ptr %y, 3
  %j.4 = insertvalue %Product %j.3, i64 %M, 4
  %j.5 = insertvalue %Product %j.4, i64 %steps, 5
  %j.6 = insertvalue %Product %j.5, i64 %N, 6
  %j.7 = insertvalue %Product %j.6, ptr %kind, 7
  %j.8 = insertvalue %Product %j.7, ptr %tiles, 8
  %j.9 = insertvalue %Product %j.8, i64 %panels, 9
  %j.10 = insertvalue %Product %j.9, i64 %unit.panels, 10
  %j.11 = insertvalue %Product %j.10, i64 %width, 11
  %j.12 = insertvalue %Product %j.11, i64 %parts.in, 12
  %j.13 = insertvalue %Product %j.12, i64 %copies.64, 13
  store %Product %j.13, ptr %job
  %error = call ptr @shared(ptr %frame, ptr %job, i64 %units, ptr @panels, i64 %threads)
  ret ptr %error
}
