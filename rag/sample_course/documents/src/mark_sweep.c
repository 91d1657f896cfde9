/* mark_sweep.c: a small mark-and-sweep collector for pairs.
 *
 *     gcc -Wall -o mark_sweep mark_sweep.c && ./mark_sweep
 *
 * The heap is an array of cells. Roots lie on an explicit stack, which stands for the
 * registers and stack slots that a real collector would read from a stack map.
 */
#include <stdbool.h>
#include <stdio.h>

#define HEAP_CELLS 8
#define ROOTS 16

struct cell {
    bool used;
    bool marked;
    struct cell *left;
    struct cell *right;
};

static struct cell heap[HEAP_CELLS];
static struct cell *roots[ROOTS];
static int root_count;

/* Mark everything that can be reached from `cell`. The mark is set before the children
 * are visited: without that a cycle would send the recursion round for ever. */
static void mark(struct cell *cell)
{
    if (cell == NULL || cell->marked)
        return;
    cell->marked = true;
    mark(cell->left);
    mark(cell->right);
}

/* Walk the whole heap, free what carries no mark and wipe the marks for next time.
 * Returns the number of cells that were given back. */
static int sweep(void)
{
    int freed = 0;
    for (int i = 0; i < HEAP_CELLS; i++) {
        if (heap[i].used && !heap[i].marked) {
            heap[i].used = false;
            freed++;
        }
        heap[i].marked = false;
    }
    return freed;
}

static int collect(void)
{
    for (int i = 0; i < root_count; i++)
        mark(roots[i]);
    return sweep();
}

/* Find a free cell; collect once when there is none; NULL when that did not help. */
static struct cell *new_pair(struct cell *left, struct cell *right)
{
    for (int attempt = 0; attempt < 2; attempt++) {
        for (int i = 0; i < HEAP_CELLS; i++) {
            if (!heap[i].used) {
                heap[i] = (struct cell){true, false, left, right};
                return &heap[i];
            }
        }
        printf("heap is full, collected %d\n", collect());
    }
    return NULL;
}

int main(void)
{
    roots[root_count++] = new_pair(NULL, NULL);
    for (int i = 0; i < 20; i++) {
        struct cell *garbage = new_pair(NULL, NULL);
        garbage->left = garbage; /* a cycle: counting references would leak it */
    }
    printf("at the end, collected %d\n", collect());
    return 0;
}
