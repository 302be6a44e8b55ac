// The loops over rows for any processor of the architecture.
#include "loops.h"

#define MATFORMER_SET baseline
#include "loops.inl"
