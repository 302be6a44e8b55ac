// The loops over rows for processors with AVX-512.
#include "loops.h"

#if defined(__x86_64__)
#include "target_avx512.h"

#define MATFORMER_SET avx512
#include "loops.inl"

#include "target_end.h"
#endif
