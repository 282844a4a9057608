// Rounding with feedback at the level portable, and the choice of the level.
#include "kernels/generic/feedback.inc.h"

namespace nybble {

void round_with_feedback_portable(const FeedbackTask& task, float* scratch) {
    round_with_feedback(task, scratch);
}

RoundWithFeedback round_with_feedback_of(Isa isa) {
#if NYBBLE_X86
    if (isa == Isa::avx512 || isa == Isa::avx512_vnni || isa == Isa::amx) return round_with_feedback_avx512;
    if (isa != Isa::portable) return round_with_feedback_avx2;
#endif
    static_cast<void>(isa);
    return round_with_feedback_portable;
}

}  // namespace nybble
