; SPDX-License-Identifier: Apache-2.0
;
; The product as a custom call of XLA: shares columns among the threads of XLA's pool.
; `tiles.py` adds the tiles, of 32 columns and up to 12 rows, and a table @tiles of them by rows - 1.
;
; Structures as in XLA's `ffi/api/c_api.h`, version 0; those of arguments and results are alike.

%Version = type { i64, ptr, i32, i32 }               ; size, extension, major, minor
%Metadata = type { i64, %Version, i32, i64 }         ; size, version, traits, type of the state
%Extension = type { i64, i32, ptr, ptr }             ; size, kind, next, metadata
%Buffer = type { i64, ptr, i32, ptr, i64, ptr }      ; size, extension, dtype, data, rank, dims
%Buffers = type { i64, ptr, i64, ptr, ptr }          ; size, extension, count, types, buffers
%Frame = type { i64, ptr, ptr, ptr, i32, %Buffers, %Buffers } ; size, extension, api, context, stage,
                                                     ; arguments, results
%Api = type { i64, ptr, %Version, ptr, [13 x ptr] }  ; functions: 11 schedules, 12 counts threads
%Schedule = type { i64, ptr, ptr, ptr, ptr }         ; size, extension, context, task, data
%Threads = type { i64, ptr, ptr, ptr }               ; size, extension, context, -> count

%Job = type {
  i64, i64, i64,     ; 0 users of the job, 1 the next unit to be taken, 2 units done
  i64, i64, i64,     ; 3 units, 4 panels, 5 panels a unit
  ptr, ptr, ptr,     ; 6 a, 7 b, 8 y
  i64, i64, i64      ; 9 M, 10 K, 11 N
}

declare ptr @malloc(i64)
declare void @free(ptr)
declare void @llvm.x86.sse2.pause()
declare i64 @llvm.umin.i64(i64, i64)
declare i64 @llvm.umax.i64(i64, i64)

; Takes units until none is left.
define internal void @work(ptr %job) {
entry:
  %next = getelementptr %Job, ptr %job, i32 0, i32 1
  %done = getelementptr %Job, ptr %job, i32 0, i32 2
  %units.at = getelementptr %Job, ptr %job, i32 0, i32 3
  %panels.at = getelementptr %Job, ptr %job, i32 0, i32 4
  %unit.panels.at = getelementptr %Job, ptr %job, i32 0, i32 5
  %units = load i64, ptr %units.at
  %panels = load i64, ptr %panels.at
  %unit.panels = load i64, ptr %unit.panels.at
  br label %take
take:
  %unit = atomicrmw add ptr %next, i64 1 monotonic
  %left = icmp ult i64 %unit, %units
  br i1 %left, label %begin, label %end
begin:
  %first = mul i64 %unit, %unit.panels
  %behind = add i64 %first, %unit.panels
  %last = call i64 @llvm.umin.i64(i64 %behind, i64 %panels)
  br label %panel
panel:
  %p = phi i64 [ %first, %begin ], [ %p.next, %panel ]
  call void @panel(ptr %job, i64 %p)
  %p.next = add i64 %p, 1
  %more = icmp ult i64 %p.next, %last
  br i1 %more, label %panel, label %finished
finished:
  %before = atomicrmw add ptr %done, i64 1 release
  br label %take
end:
  ret void
}

; All rows of a panel of columns. The last panel ends with the last column: where it overlaps the
; one before, both write the same numbers.
define internal void @panel(ptr %job, i64 %p) {
entry:
  %job.value = load %Job, ptr %job
  %a = extractvalue %Job %job.value, 6
  %b = extractvalue %Job %job.value, 7
  %y = extractvalue %Job %job.value, 8
  %M = extractvalue %Job %job.value, 9
  %K = extractvalue %Job %job.value, 10
  %N = extractvalue %Job %job.value, 11
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

; Frees the job with its last user: a task may begin after everything has been done.
define internal void @release(ptr %job) {
entry:
  %users = getelementptr %Job, ptr %job, i32 0, i32 0
  %before = atomicrmw sub ptr %users, i64 1 acq_rel
  %was.last = icmp eq i64 %before, 1
  br i1 %was.last, label %free, label %end
free:
  call void @free(ptr %job)
  br label %end
end:
  ret void
}

define internal void @task(ptr %job) {
  call void @work(ptr %job)
  call void @release(ptr %job)
  ret void
}

; XLA_FFI_Error* handler(XLA_FFI_CallFrame*): a [M, K], b [K, N] -> y [M, N].
define ptr @handler(ptr %frame) {
entry:
  %frame.value = load %Frame, ptr %frame
  %extension = extractvalue %Frame %frame.value, 1
  %asked = icmp ne ptr %extension, null
  br i1 %asked, label %describe, label %execute
describe:
  %metadata.at = getelementptr %Extension, ptr %extension, i32 0, i32 3
  %metadata = load ptr, ptr %metadata.at
  %major = getelementptr %Metadata, ptr %metadata, i32 0, i32 1, i32 2
  store i32 0, ptr %major
  %minor = getelementptr %Metadata, ptr %metadata, i32 0, i32 1, i32 3
  store i32 1, ptr %minor                            ; an early version: later ones have all of it
  %traits = getelementptr %Metadata, ptr %metadata, i32 0, i32 2
  store i32 0, ptr %traits
  %state = getelementptr %Metadata, ptr %metadata, i32 0, i32 3
  store i64 0, ptr %state
  ret ptr null
execute:
  %arguments = extractvalue %Frame %frame.value, 5, 4
  %results = extractvalue %Frame %frame.value, 6, 4
  %a.buffer = load ptr, ptr %arguments
  %b.buffer.at = getelementptr ptr, ptr %arguments, i64 1
  %b.buffer = load ptr, ptr %b.buffer.at
  %y.buffer = load ptr, ptr %results
  %a.value = load %Buffer, ptr %a.buffer
  %b.value = load %Buffer, ptr %b.buffer
  %y.value = load %Buffer, ptr %y.buffer
  %a = extractvalue %Buffer %a.value, 3
  %b = extractvalue %Buffer %b.value, 3
  %y = extractvalue %Buffer %y.value, 3
  %a.dims = extractvalue %Buffer %a.value, 5
  %b.dims = extractvalue %Buffer %b.value, 5
  %M = load i64, ptr %a.dims
  %K = load i64, ptr %b.dims
  %N.at = getelementptr i64, ptr %b.dims, i64 1
  %N = load i64, ptr %N.at
  %N.up = add i64 %N, 31
  %panels = udiv i64 %N.up, 32

  %api = extractvalue %Frame %frame.value, 2
  %context = extractvalue %Frame %frame.value, 3
  %threads.count = alloca i64
  store i64 1, ptr %threads.count
  %threads.arguments = alloca %Threads
  %threads.0 = insertvalue %Threads { i64 32, ptr null, ptr null, ptr null }, ptr %context, 2
  %threads.1 = insertvalue %Threads %threads.0, ptr %threads.count, 3
  store %Threads %threads.1, ptr %threads.arguments
  %threads.at = getelementptr %Api, ptr %api, i32 0, i32 4, i32 12
  %threads.function = load ptr, ptr %threads.at
  %threads.error = call ptr %threads.function(ptr %threads.arguments)
  %threads.failed = icmp ne ptr %threads.error, null
  br i1 %threads.failed, label %fail, label %share
fail:
  ret ptr %threads.error
share:
  %threads.any = load i64, ptr %threads.count
  %threads.some = call i64 @llvm.umax.i64(i64 %threads.any, i64 1)
  %threads = call i64 @llvm.umin.i64(i64 %threads.some, i64 %panels)
  ; A few units a thread, so that one that comes late holds up nothing.
  %parts = mul i64 %threads, 4
  %panels.up = add i64 %panels, %parts
  %panels.up.less = sub i64 %panels.up, 1
  %unit.panels = udiv i64 %panels.up.less, %parts
  %units.up = add i64 %panels, %unit.panels
  %units.up.less = sub i64 %units.up, 1
  %units = udiv i64 %units.up.less, %unit.panels

  %job = call ptr @malloc(i64 96)
  %j.0 = insertvalue %Job zeroinitializer, i64 %threads, 0
  %j.3 = insertvalue %Job %j.0, i64 %units, 3
  %j.4 = insertvalue %Job %j.3, i64 %panels, 4
  %j.5 = insertvalue %Job %j.4, i64 %unit.panels, 5
  %j.6 = insertvalue %Job %j.5, ptr %a, 6
  %j.7 = insertvalue %Job %j.6, ptr %b, 7
  %j.8 = insertvalue %Job %j.7, ptr %y, 8
  %j.9 = insertvalue %Job %j.8, i64 %M, 9
  %j.10 = insertvalue %Job %j.9, i64 %K, 10
  %j.11 = insertvalue %Job %j.10, i64 %N, 11
  store %Job %j.11, ptr %job
  %schedule.at = getelementptr %Api, ptr %api, i32 0, i32 4, i32 11
  %schedule = load ptr, ptr %schedule.at
  %schedule.arguments = alloca %Schedule
  %s.0 = insertvalue %Schedule { i64 40, ptr null, ptr null, ptr @task, ptr null }, ptr %context, 2
  %s.1 = insertvalue %Schedule %s.0, ptr %job, 4
  store %Schedule %s.1, ptr %schedule.arguments
  br label %others
others:
  %scheduled = phi i64 [ 1, %share ], [ %scheduled.next, %other ]
  %more = icmp ult i64 %scheduled, %threads
  br i1 %more, label %other, label %own
other:
  %scheduled.next = add i64 %scheduled, 1
  %error = call ptr %schedule(ptr %schedule.arguments)
  %failed = icmp ne ptr %error, null
  br i1 %failed, label %stop, label %others
stop:
  ; Those that began hold the job, which is then never freed: XLA reports the error.
  ret ptr %error
own:
  call void @work(ptr %job)
  %done.at = getelementptr %Job, ptr %job, i32 0, i32 2
  br label %wait
wait:
  %done = load atomic i64, ptr %done.at acquire, align 8
  %all = icmp eq i64 %done, %units
  br i1 %all, label %end, label %pause
pause:
  call void @llvm.x86.sse2.pause()
  br label %wait
end:
  call void @release(ptr %job)
  ret ptr null
}
