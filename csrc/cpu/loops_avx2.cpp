// The loops over rows for processors with AVX2.
#include "loops.h"

#if defined(__x86_64__)
#include "target_avx2.h"

#define MATFORMER_SET avx2
#include "loops.inl"

#include "target_end.h"
#endif
