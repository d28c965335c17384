; SPDX-License-Identifier: Apache-2.0
;
; What custom calls of XLA have in common: its structures, and a job shared among the threads of its
; pool. Structures are those of XLA's `ffi/api/c_api.h`, version 0.

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

; Users of the job, the next unit to be taken, units done, units, void work(job, unit). What the work
; needs to know lies behind.
%Job = type { i64, i64, i64, i64, ptr }

declare ptr @malloc(i64)
declare void @free(ptr)
declare i32 @sched_yield()
declare void @llvm.x86.sse2.pause()
declare i64 @llvm.umin.i64(i64, i64)
declare i64 @llvm.umax.i64(i64, i64)

; Answers XLA's question which version a handler is of; false where it asks nothing.
define internal i1 @described(ptr %frame) {
entry:
  %extension.at = getelementptr %Frame, ptr %frame, i32 0, i32 1
  %extension = load ptr, ptr %extension.at
  %extended = icmp ne ptr %extension, null
  br i1 %extended, label %look, label %no
look:
  %kind.at = getelementptr %Extension, ptr %extension, i32 0, i32 1
  %kind = load i32, ptr %kind.at
  %asked = icmp eq i32 %kind, 1                      ; XLA_FFI_Extension_Metadata
  br i1 %asked, label %describe, label %no
no:
  ret i1 false
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
  ret i1 true
}

define internal ptr @argument(ptr %frame, i64 %number) {
  %buffers.at = getelementptr %Frame, ptr %frame, i32 0, i32 5, i32 4
  %buffers = load ptr, ptr %buffers.at
  %buffer.at = getelementptr ptr, ptr %buffers, i64 %number
  %buffer = load ptr, ptr %buffer.at
  ret ptr %buffer
}

define internal ptr @result(ptr %frame) {
  %buffers.at = getelementptr %Frame, ptr %frame, i32 0, i32 6, i32 4
  %buffers = load ptr, ptr %buffers.at
  %buffer = load ptr, ptr %buffers
  ret ptr %buffer
}

define internal ptr @data(ptr %buffer) {
  %data.at = getelementptr %Buffer, ptr %buffer, i32 0, i32 3
  %data = load ptr, ptr %data.at
  ret ptr %data
}

define internal i64 @dim(ptr %buffer, i64 %axis) {
  %dims.at = getelementptr %Buffer, ptr %buffer, i32 0, i32 5
  %dims = load ptr, ptr %dims.at
  %dim.at = getelementptr i64, ptr %dims, i64 %axis
  %dim = load i64, ptr %dim.at
  ret i64 %dim
}

; Threads of the pool, at least 1, at most so many.
define internal i64 @threads(ptr %frame, i64 %most) {
  %frame.value = load %Frame, ptr %frame
  %api = extractvalue %Frame %frame.value, 2
  %context = extractvalue %Frame %frame.value, 3
  %count.at = alloca i64
  store i64 1, ptr %count.at
  %arguments.at = alloca %Threads
  %arguments.0 = insertvalue %Threads { i64 32, ptr null, ptr null, ptr null }, ptr %context, 2
  %arguments = insertvalue %Threads %arguments.0, ptr %count.at, 3
  store %Threads %arguments, ptr %arguments.at
  %function.at = getelementptr %Api, ptr %api, i32 0, i32 4, i32 12
  %function = load ptr, ptr %function.at
  %error = call ptr %function(ptr %arguments.at)
  %count = load i64, ptr %count.at
  %some = call i64 @llvm.umax.i64(i64 %count, i64 1)
  %threads = call i64 @llvm.umin.i64(i64 %some, i64 %most)
  ret i64 %threads
}

define internal i64 @quotient_up(i64 %a, i64 %b) {
  %a.less = sub i64 %a, 1
  %sum = add i64 %a.less, %b
  %quotient = udiv i64 %sum, %b
  ret i64 %quotient
}

; How many of a job's parts are a unit: neighbours, an even number, as two may be read at once; but so
; few that a thread that comes late holds up nothing.
define internal i64 @unit(i64 %parts, i64 %threads) {
  %pairs = call i64 @quotient_up(i64 %parts, i64 2)
  %units = mul i64 %threads, 16
  %unit.pairs = call i64 @quotient_up(i64 %pairs, i64 %units)
  %unit = mul i64 %unit.pairs, 2
  ret i64 %unit
}

; Takes units until none is left.
define internal void @take(ptr %job) {
entry:
  %job.value = load %Job, ptr %job
  %units = extractvalue %Job %job.value, 3
  %work = extractvalue %Job %job.value, 4
  %next = getelementptr %Job, ptr %job, i32 0, i32 1
  %done = getelementptr %Job, ptr %job, i32 0, i32 2
  br label %one
one:
  %unit = atomicrmw add ptr %next, i64 1 monotonic
  %left = icmp ult i64 %unit, %units
  br i1 %left, label %do, label %end
do:
  call void %work(ptr %job, i64 %unit)
  %before = atomicrmw add ptr %done, i64 1 release
  br label %one
end:
  ret void
}

; Frees the job with its last user: a task may begin after everything has been done.
define internal void @release(ptr %job) {
entry:
  %before = atomicrmw sub ptr %job, i64 1 acq_rel
  %was.last = icmp eq i64 %before, 1
  br i1 %was.last, label %free, label %end
free:
  call void @free(ptr %job)
  br label %end
end:
  ret void
}

define internal void @task(ptr %job) {
  call void @take(ptr %job)
  call void @release(ptr %job)
  ret void
}

; Does a job, which `malloc` made and this frees, on so many threads, or as many as it has units.
; Whoever is first takes the next unit, so that nothing waits for a thread that is busy elsewhere.
; Returns an error of XLA's, or null.
define internal ptr @shared(ptr %frame, ptr %job, i64 %units, ptr %work, i64 %threads) {
entry:
  %users = call i64 @llvm.umin.i64(i64 %threads, i64 %units)
  %job.0 = insertvalue %Job zeroinitializer, i64 %users, 0
  %job.3 = insertvalue %Job %job.0, i64 %units, 3
  %job.4 = insertvalue %Job %job.3, ptr %work, 4
  store %Job %job.4, ptr %job
  %frame.value = load %Frame, ptr %frame
  %api = extractvalue %Frame %frame.value, 2
  %context = extractvalue %Frame %frame.value, 3
  %schedule.at = getelementptr %Api, ptr %api, i32 0, i32 4, i32 11
  %schedule = load ptr, ptr %schedule.at
  %arguments.at = alloca %Schedule
  %arguments.0 = insertvalue %Schedule { i64 40, ptr null, ptr null, ptr @task, ptr null }, ptr %context, 2
  %arguments = insertvalue %Schedule %arguments.0, ptr %job, 4
  store %Schedule %arguments, ptr %arguments.at
  br label %others
others:
  %scheduled = phi i64 [ 1, %entry ], [ %scheduled.next, %other ]
  %more = icmp ult i64 %scheduled, %users
  br i1 %more, label %other, label %own
other:
  %scheduled.next = add i64 %scheduled, 1
  %error = call ptr %schedule(ptr %arguments.at)
  %failed = icmp ne ptr %error, null
  br i1 %failed, label %alone, label %others
alone:
  ; Those that were scheduled and this thread do all of it, and XLA gets the error at the end.
  %missing = sub i64 %users, %scheduled
  %before = atomicrmw sub ptr %job, i64 %missing acq_rel
  br label %own
own:
  %outcome = phi ptr [ null, %others ], [ %error, %alone ]
  call void @take(ptr %job)
  %done.at = getelementptr %Job, ptr %job, i32 0, i32 2
  br label %wait
wait:
  %done = load atomic i64, ptr %done.at acquire, align 8
  %all = icmp eq i64 %done, %units
  br i1 %all, label %end, label %pause
pause:
  call void @llvm.x86.sse2.pause()
  %yielded = call i32 @sched_yield()                 ; more devices than cores take turns
  br label %wait
end:
  call void @release(ptr %job)
  ret ptr %outcome
}
