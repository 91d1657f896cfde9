// MiniC.g4: the MiniC grammar in the notation of ANTLR 4, for those who take the
// ANTLR road through the second lab. ANTLR rewrites direct left recursion itself,
// and among the alternatives of one rule the one written first binds tightest.
grammar MiniC;

compUnit  : (decl | funcDef)+ EOF ;

decl      : 'const'? bType varDef (',' varDef)* ';' ;
bType     : 'int' ;
varDef    : IDENT ('[' expr ']')* ('=' initVal)? ;
initVal   : expr
          | '{' (initVal (',' initVal)*)? '}'
          ;

funcDef   : funcType IDENT '(' params? ')' block ;
funcType  : 'void' | 'int' ;
params    : param (',' param)* ;
param     : bType IDENT ('[' ']' ('[' expr ']')*)? ;

block     : '{' (decl | stmt)* '}' ;

// The else belongs to the nearest open if: ANTLR tries to take the optional part
// as early as it can, which is just what the language wants.
stmt      : lVal '=' expr ';'                          # assign
          | expr? ';'                                  # exprStmt
          | block                                      # nested
          | 'if' '(' expr ')' stmt ('else' stmt)?      # if
          | 'while' '(' expr ')' stmt                  # while
          | 'break' ';'                                # break
          | 'continue' ';'                             # continue
          | 'return' expr? ';'                         # return
          ;

lVal      : IDENT ('[' expr ']')* ;

expr      : '(' expr ')'                               # paren
          | IDENT '(' (expr (',' expr)*)? ')'          # call
          | lVal                                       # read
          | NUMBER                                     # number
          | op=('+' | '-' | '!') expr                  # unary
          | expr op=('*' | '/' | '%') expr             # mul
          | expr op=('+' | '-') expr                   # add
          | expr op=('<' | '>' | '<=' | '>=') expr     # compare
          | expr op=('==' | '!=') expr                 # equal
          | expr '&&' expr                             # and
          | expr '||' expr                             # or
          ;

IDENT     : [A-Za-z_] [A-Za-z0-9_]* ;
NUMBER    : '0' [xX] [0-9a-fA-F]+ | '0' [0-7]* | [1-9] [0-9]* ;
LINE      : '//' ~[\r\n]* -> skip ;
BLOCK     : '/*' .*? '*/' -> skip ;
WS        : [ \t\r\n]+ -> skip ;
