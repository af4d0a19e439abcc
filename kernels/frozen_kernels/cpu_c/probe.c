// The smallest kernel: whether this compiler builds the shared part, with the element type of the macro KIND.

#include "common.h"

#if KIND == 2 && !defined(__FLT16_MAX__)
#error "the compiler knows no _Float16"
#endif

void round_trip(const void *from, void *to, long count) {
    for (long i = 0; i < count; i++) {
        float value;
        load(KIND, from, i, &value, 1);
        store(KIND, to, i, &value, 1);
    }
}
