; gcd.ll: Euclid's algorithm in LLVM IR, written by hand in SSA form.
;
; MiniC source:
;     int gcd(int a, int b) {
;       while (b != 0) { int t = a % b; a = b; b = t; }
;       return a;
;     }
; Run it with: lli gcd.ll; echo $?      (prints 6, the divisor of 54 and 24)

define i32 @gcd(i32 %a0, i32 %b0) {
entry:
  br label %test

; The two phi instructions merge the value from before the loop with the value that
; the loop body computed. All phis of a block read their operands at the same moment,
; so %a takes the old %b even though %b changes in the next line.
test:
  %a = phi i32 [ %a0, %entry ], [ %b, %body ]
  %b = phi i32 [ %b0, %entry ], [ %t, %body ]
  %more = icmp ne i32 %b, 0
  br i1 %more, label %body, label %done

body:
  %t = srem i32 %a, %b
  br label %test

done:
  ret i32 %a
}

define i32 @main() {
  %r = call i32 @gcd(i32 54, i32 24)
  ret i32 %r
}
