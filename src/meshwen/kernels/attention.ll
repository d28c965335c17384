; SPDX-License-Identifier: Apache-2.0
;
; Attention of one query token a sequence over the part of the cache that it sees.
;
;   q float32 [B, K * G, 1, H], scaled; keys float32 [B, K, H, S]; values bfloat16 [B, K, S, H];
;   first, last int32 [B], the slots that are seen; y as q. S and H are multiples of 16.
;
; `attend.py` adds a function for each G up to 8, and a table @attends of them by G - 1.

%Attention = type {
  %Job,
  ptr, ptr, ptr, ptr, ; 1 q, 2 keys, 3 values, 4 y
  ptr, ptr,           ; 5 first, 6 last
  i64, i64, i64, i64  ; 7 K, 8 G, 9 H, 10 S
}

; The unit of work: a key/value head of a sequence, and the G queries that it serves.
define internal void @head(ptr %job, i64 %unit) {
entry:
  %job.value = load %Attention, ptr %job
  %q = extractvalue %Attention %job.value, 1
  %keys = extractvalue %Attention %job.value, 2
  %values = extractvalue %Attention %job.value, 3
  %y = extractvalue %Attention %job.value, 4
  %firsts = extractvalue %Attention %job.value, 5
  %lasts = extractvalue %Attention %job.value, 6
  %K = extractvalue %Attention %job.value, 7
  %G = extractvalue %Attention %job.value, 8
  %H = extractvalue %Attention %job.value, 9
  %S = extractvalue %Attention %job.value, 10
  %b = udiv i64 %unit, %K
  %first.at = getelementptr i32, ptr %firsts, i64 %b
  %first = load i32, ptr %first.at
  %last.at = getelementptr i32, ptr %lasts, i64 %b
  %last = load i32, ptr %last.at
  %GH = mul i64 %G, %H
  %SH = mul i64 %S, %H
  %q.offset = mul i64 %unit, %GH
  %kv.offset = mul i64 %unit, %SH
  %q.head = getelementptr float, ptr %q, i64 %q.offset
  %y.head = getelementptr float, ptr %y, i64 %q.offset
  %keys.head = getelementptr float, ptr %keys, i64 %kv.offset
  %values.head = getelementptr bfloat, ptr %values, i64 %kv.offset
  %GS = mul i64 %G, %S
  %scores.bytes = mul i64 %GS, 4
  %scores = call ptr @malloc(i64 %scores.bytes)
  %G.less = sub i64 %G, 1
  %attend.at = getelementptr ptr, ptr @attends, i64 %G.less
  %attend = load ptr, ptr %attend.at
  call void %attend(ptr %q.head, ptr %keys.head, ptr %values.head, ptr %y.head, ptr %scores,
                    i64 %H, i64 %S, i32 %first, i32 %last)
  call void @free(ptr %scores)
  ret void
}

; XLA_FFI_Error* attention(XLA_FFI_CallFrame*)
define ptr @attention(ptr %frame) {
entry:
  %described = call i1 @described(ptr %frame)
  br i1 %described, label %end, label %execute
end:
  ret ptr null
execute:
  %q.buffer = call ptr @argument(ptr %frame, i64 0)
  %keys.buffer = call ptr @argument(ptr %frame, i64 1)
  %values.buffer = call ptr @argument(ptr %frame, i64 2)
  %first.buffer = call ptr @argument(ptr %frame, i64 3)
  %last.buffer = call ptr @argument(ptr %frame, i64 4)
  %y.buffer = call ptr @result(ptr %frame)
  %q = call ptr @data(ptr %q.buffer)
  %keys = call ptr @data(ptr %keys.buffer)
  %values = call ptr @data(ptr %values.buffer)
  %first = call ptr @data(ptr %first.buffer)
  %last = call ptr @data(ptr %last.buffer)
  %y = call ptr @data(ptr %y.buffer)
  %B = call i64 @dim(ptr %keys.buffer, i64 0)
  %K = call i64 @dim(ptr %keys.buffer, i64 1)
  %H = call i64 @dim(ptr %keys.buffer, i64 2)
  %S = call i64 @dim(ptr %keys.buffer, i64 3)
  %N = call i64 @dim(ptr %q.buffer, i64 1)
  %G = udiv i64 %N, %K
  %units = mul i64 %B, %K
  %job = call ptr @malloc(i64 120)
  %j.1 = insertvalue %Attention zeroinitializer, ptr %q, 1
  %j.2 = insertvalue %Attention %j.1, ptr %keys, 2
  %j.3 = insertvalue %Attention %j.2, ptr %values, 3
  %j.4 = insertvalue %Attention %j.3, ptr %y, 4
  %j.5 = insertvalue %Attention %j.4, ptr %first, 5
  %j.6 = insertvalue %Attention %j.5, ptr %last, 6
  %j.7 = insertvalue %Attention %j.6, i64 %K, 7
  %j.8 = insertvalue %Attention %j.7, i64 %G, 8
  %j.9 = insertvalue %Attention %j.8, i64 %H, 9
  %j.10 = insertvalue %Attention %j.9, i64 %S, 10
  store %Attention %j.10, ptr %job
  %error = call ptr @shared(ptr %frame, ptr %job, i64 %units, ptr @head)
  ret ptr %error
}
