/* calc.y: a desk calculator, the warm-up for the second lab.
 *
 *     bison -o calc.c calc.y && gcc -o calc calc.c
 *     printf '1+2*3\n-2*4\n2-3-4\n' | ./calc
 *
 * prints 7, -8 and -5: multiplication binds tighter than addition, unary minus
 * tighter than both, and minus groups from the left.
 */
%{
#include <ctype.h>
#include <stdio.h>

int yylex(void);
void yyerror(const char *message);
%}

%define api.value.type {long}
%define parse.error verbose

%token NUMBER

/* Lowest line binds loosest. UMINUS is no token: it only lends its rank to the
 * rule of the unary minus through %prec. */
%left '+' '-'
%left '*' '/'
%precedence UMINUS

%%

input
    : %empty
    | input line
    ;

/* The error rule is the recovery point: after a syntax error the parser pops its
 * stack until "error" can be shifted, throws tokens away up to the line end and
 * carries on with the next line. yyerrok says that messages may be shown again. */
line
    : '\n'
    | expr '\n'         { printf("%ld\n", $1); }
    | error '\n'        { yyerrok; }
    ;

expr
    : NUMBER
    | expr '+' expr     { $$ = $1 + $3; }
    | expr '-' expr     { $$ = $1 - $3; }
    | expr '*' expr     { $$ = $1 * $3; }
    | expr '/' expr     {
          if ($3 == 0) {
              yyerror("division by zero");
              $$ = 0;
          } else {
              $$ = $1 / $3;
          }
      }
    | '-' expr %prec UMINUS { $$ = -$2; }
    | '(' expr ')'      { $$ = $2; }
    ;

%%

/* A hand-written scanner is enough here: digits make a NUMBER, any other
 * character stands for itself, and 0 tells the parser that the input is over. */
int yylex(void)
{
    int c = getchar();
    while (c == ' ' || c == '\t')
        c = getchar();
    if (c == EOF)
        return 0;
    if (!isdigit(c))
        return c;
    yylval = 0;
    while (isdigit(c)) {
        yylval = yylval * 10 + (c - '0');
        c = getchar();
    }
    ungetc(c, stdin);
    return NUMBER;
}

void yyerror(const char *message)
{
    fprintf(stderr, "%s\n", message);
}

int main(void)
{
    return yyparse();
}
