// Body of loops_<set>.cpp, which defines MATFORMER_SET. No standard header may come in here: an
// inline function of one, compiled for a wide instruction set, could be linked for all.

namespace matformer {
namespace MATFORMER_SET {

namespace {

#include "math.inl"

#include "loss_loops.inl"

#include "activation_loops.inl"

}  // namespace

const LossLoops<float> loss_of_float = kLossLoops<float>;
const LossLoops<bfloat16> loss_of_bfloat16 = kLossLoops<bfloat16>;
const ActivationLoops<float> activation_of_float = kActivationLoops<float>;
const ActivationLoops<bfloat16> activation_of_bfloat16 = kActivationLoops<bfloat16>;

}  // namespace MATFORMER_SET
}  // namespace matformer
