// Numbers of storage types, as launchers take them.
#pragma once

namespace matformer {

enum DType { kFloat32, kBFloat16, kFloat16, kNoGradient };

}  // namespace matformer
