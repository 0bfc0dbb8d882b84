// How the C library's malloc keeps what was freed.
//
// glibc gives threads arenas of their own, up to eight for each core. Memory that one thread has freed is then of no use
// to the others, and what is free below a block in use never goes back to the system: a server of many short threads
// grows for hours without holding a byte more.

#include "sllm.h"

#include <cstdlib>

#ifdef __GLIBC__
#include <malloc.h>
#endif

int sllm_bound_arenas(int32_t n_arenas, int32_t large) {
#ifdef __GLIBC__
    // A threshold that is set also stays where it is: else the largest block that was freed raises both of them.
    const bool set = mallopt(M_ARENA_MAX, n_arenas) == 1 && mallopt(M_MMAP_THRESHOLD, large) == 1;
    return set && mallopt(M_TRIM_THRESHOLD, large) == 1 ? 1 : 0;
#else
    static_cast<void>(n_arenas);
    static_cast<void>(large);
    return 0;
#endif
}
