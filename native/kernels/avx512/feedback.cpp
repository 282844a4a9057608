// Rounding with feedback for AVX-512: the same code, wider registers.
#include "kernels/generic/feedback.inc.h"

namespace nybble {

void round_with_feedback_avx512(const FeedbackTask& task, float* scratch) {
    round_with_feedback(task, scratch);
}

}  // namespace nybble
