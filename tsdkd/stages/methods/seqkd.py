"""SeqKD: cross-entropy on the teacher's responses; on given responses it is supervised fine-tuning.

Source: Kim and Rush, EMNLP 2016.
Data: rollouts of `generate --policy teacher` or `given`; neither scores nor a teacher.
Loss: `-1/L sum_t log q(y_t)`, eq. (9), which puts one response in place of the teacher's distribution over sequences.

Differences from the paper: responses are sampled (greedy with --temperature 0), and the paper's come from beam search;
the loss is the mean over a response's tokens, then over responses, and the paper's is the sum over tokens.
"""

from tsdkd.core.config import TSDKDConfig
from tsdkd.stages.methods.method import DIVERGENCE_ONLY, Method

METHOD = Method(
    name="seqkd",
    full_name="sequence-level distillation (Kim and Rush, 2016)",
    description="cross-entropy on the teacher's responses, or on given ones",
    objective=TSDKDConfig(beta=0.0, **DIVERGENCE_ONLY),
    objective_options=(),
    authors=("teacher", "given"),
    needs_teacher=False,
    online_responses=False,
)
