"""The two passes over chunks of tokens that compute the objective; docs/loss_without_logits.md derives the gradients.

The first pass forms each token's logits once and takes all that the token's own two distributions determine: entropies,
gate, divergence and the divergence's gradient. Then selection knows the openers and the most uncertain tokens. The
second pass forms the student's logits again at these tokens alone. With a policy gradient it reads all tokens again,
because that term weights a token by its later tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tsdkd.core.chunk_sizes import ChunkSizes, slices
from tsdkd.core.comparison import (
    TokenValues,
    compare_by_kernel,
    compare_logits,
    compare_signal,
    compiled_compare_logits,
    join,
    kernel_fits,
)
from tsdkd.core.config import TSDKDConfig
from tsdkd.core.gradients import (
    BlockBuffers,
    negative_entropy_grad,
    negative_log_prob_grad,
    softmax,
    write_product,
)
from tsdkd.core.head import LinearOutputs
from tsdkd.core.metrics import loss_metrics, to_grid
from tsdkd.core.objective import weighted_sum
from tsdkd.core.policy_gradient import Sampled, mean_future_rewards
from tsdkd.core.ranking import plackett_luce_grad, plackett_luce_nll
from tsdkd.core.selection import OpenerFraction, gated_weights, mean_weights, select_tokens
from tsdkd.core.student_logits import StudentLogits
from tsdkd.core.teacher_signals import TeacherSignal


@dataclass(slots=True)
class TwoPasses:
    """One evaluation of the objective; gradients accumulate in `student`.

    Weights of tokens, (tokens,), include the mean over the responses. A gradient at the tempered logits z/T is divided
    by T to become one at the logits z.
    """

    student: StudentLogits
    teacher: TeacherSignal
    response_mask: Tensor
    config: TSDKDConfig
    sampled: Sampled | None
    sizes: ChunkSizes
    compiled: bool
    _teacher_buffer: Tensor | None = None

    def run(self, opener_fraction: OpenerFraction | None) -> tuple[Tensor, dict[str, Tensor]]:
        """First pass, selection, second pass -> the loss, detached, and its metrics."""
        config, mask = self.config, self.response_mask
        values, direct, gate = self._first_pass()
        student_entropy, teacher_entropy = to_grid(values.student_entropy, mask), to_grid(values.teacher_entropy, mask)
        indirect, entropy = (
            weights[mask] / len(mask)
            for weights in select_tokens(student_entropy, teacher_entropy, mask, config, opener_fraction)
        )
        policy = direct * mean_future_rewards(to_grid(values.reward, mask), mask)[mask]
        candidate_logits = self._second_pass(indirect, entropy, policy, values.student_entropy)

        opener = indirect > 0
        terms: dict[str, Tensor] = {}
        if candidate_logits is not None:
            nll = plackett_luce_nll(candidate_logits, "ranking" in config.released)
            terms["indirect"] = (indirect[opener] * nll).sum()
        if config.direct_weight:
            terms["direct"] = (direct * values.divergence).sum()
        if config.em_weight:
            terms["entropy"] = (entropy * values.student_entropy).sum()
        if self.sampled:
            terms["policy_gradient"] = -policy.sum()
        means = {
            "student_entropy": values.student_entropy,
            "teacher_entropy": values.teacher_entropy,
            "top1_agreement": values.top1_agreement,
            "gate": gate,
        }
        return weighted_sum(terms, config), loss_metrics(terms, means, to_grid(opener, mask), mask, candidate_logits)

    def _first_pass(self) -> tuple[TokenValues, Tensor, Tensor]:
        """Compare both models at every token and accumulate the direct term's gradient.

        Returns the values, and the direct term's weights and gate (tokens,).
        """
        config, mask = self.config, self.response_mask
        inverse_length = mean_weights(mask)[mask].to(self.student.wide)
        chunks = []
        for tokens in slices(len(self.teacher), self.sizes.chunk):
            student = self.student.linear(tokens)
            values = self._compare_chunk(student, self.teacher.take(tokens), self.sampled and self.sampled.take(tokens))
            grads = student.values  # now the divergence's gradient
            weights, gate = gated_weights(
                values.student_entropy, values.teacher_entropy, inverse_length[tokens], config
            )
            weights = weights / len(mask) * values.importance
            if config.direct_weight and self.student.requires_grad:
                self.student.accumulate(tokens, grads, config.direct_weight / config.temperature * weights)
            chunks.append((values, weights, gate))
        all_values, all_weights, all_gates = zip(*chunks, strict=True)
        return join(all_values), torch.cat(all_weights), torch.cat(all_gates)

    def _compare_chunk(self, student: LinearOutputs, teacher: TeacherSignal, sampled: Sampled | None) -> TokenValues:
        """Compare both models at a chunk's tokens; the divergence's gradient overwrites `student.values`."""
        return join(
            [
                self._compare_part(student.take(part), teacher.take(part), sampled and sampled.take(part))
                for part in slices(len(student), self.sizes.teacher_part)
            ]
        )

    def _compare_part(self, student: LinearOutputs, teacher: TeacherSignal, sampled: Sampled | None) -> TokenValues:
        """`_compare_chunk` for the part of a chunk whose teacher logits exist at a time."""
        if teacher.vocab is None:
            return self._compare_blocks(compare_signal, student, teacher.take, sampled)
        outputs = teacher.linear_outputs(self._teacher_buffer)
        if self._teacher_buffer is None:
            self._teacher_buffer = outputs.values  # no later part has more tokens
        if self.compiled and kernel_fits(student.values):
            return compare_by_kernel(student, outputs, self.config, sampled)
        compare = compiled_compare_logits() if self.compiled else compare_logits
        return self._compare_blocks(compare, student, lambda block: outputs.take(block).logits(), sampled)

    def _compare_blocks(
        self,
        compare: Callable[..., TokenValues],
        student: LinearOutputs,
        teacher_block: Callable[[slice], Tensor | TeacherSignal],
        sampled: Sampled | None,
    ) -> TokenValues:
        values = []
        for block in slices(len(student), self.sizes.block):
            outputs = student.take(block)
            logits = outputs.logits()
            values.append(
                compare(
                    logits,
                    teacher_block(block),
                    outputs.softcap_grad(logits),
                    self.config,
                    sampled and sampled.take(block),
                    BlockBuffers() if self.compiled else self._buffers(len(outputs)),
                    grad_out=outputs.values,
                )
            )
        return join(values)

    def _second_pass(self, indirect: Tensor, entropy: Tensor, policy: Tensor, entropies: Tensor) -> Tensor | None:
        """Accumulate the gradients of the other terms, from the weights of the tokens in each and their entropies.

        Returns the student's tempered logits at its candidates on the opener (n, k), the teacher's favourite first;
        None without an indirect term.
        """
        config = self.config
        in_indirect = (indirect > 0) & (config.alpha > 0)
        in_entropy = (entropy > 0) & (config.em_weight > 0)
        in_policy = policy * config.policy_gradient_weight != 0
        selected = (in_indirect | in_entropy | in_policy).nonzero().squeeze(-1)
        candidate_logits = []
        for chunk in slices(len(selected), self.sizes.chunk):
            tokens = selected[chunk]
            outputs = self.student.linear(tokens)
            if config.alpha:
                mask = in_indirect[tokens]
                candidate_logits += self._indirect_grad(tokens[mask], outputs.take(mask), indirect[tokens[mask]])
            if config.em_weight and self.student.requires_grad:
                mask = in_entropy[tokens]
                self._entropy_grad(tokens[mask], outputs.take(mask), entropy[tokens[mask]], entropies[tokens[mask]])
            if self.sampled and self.student.requires_grad:
                mask = in_policy[tokens]
                self._policy_grad(
                    tokens[mask], outputs.take(mask), policy[tokens[mask]], self.sampled.ids[tokens[mask]]
                )
        if not config.alpha:
            return None
        return torch.cat(candidate_logits) if candidate_logits else entropies.new_empty(0, config.k)

    def _indirect_grad(self, tokens: Tensor, outputs: LinearOutputs, weights: Tensor) -> list[Tensor]:
        """Accumulate the indirect term's gradient; return the tempered candidate logits (n, k) of each block."""
        config, all_scores = self.config, []
        for block in slices(len(tokens), self.sizes.ranking):
            logits = outputs.take(block).logits()
            ids = self.teacher.take(tokens[block]).ranked_candidates(logits, config.k)
            ranked_logits = logits.gather(-1, ids).to(self.student.wide)
            scores = ranked_logits / config.temperature
            grads = (config.alpha / config.temperature * weights[block]).unsqueeze(-1)
            grads = grads * plackett_luce_grad(scores, "ranking" in config.released)
            softcap_grad = outputs.softcap_grad(ranked_logits)
            self.student.accumulate_at(tokens[block], ids, grads if softcap_grad is None else grads * softcap_grad)
            all_scores.append(scores)
        return all_scores

    def _entropy_grad(self, tokens: Tensor, outputs: LinearOutputs, weights: Tensor, entropies: Tensor) -> None:
        """Accumulate the entropy term's gradient."""
        weights = -self.config.em_weight / self.config.temperature * weights
        self._accumulate(
            tokens, outputs, weights, lambda block, q, log_q: negative_entropy_grad(q, log_q, entropies[block])
        )

    def _policy_grad(self, tokens: Tensor, outputs: LinearOutputs, weights: Tensor, ids: Tensor) -> None:
        """Accumulate the policy gradient, at temperature 1."""
        weights = self.config.policy_gradient_weight * weights
        self._accumulate(tokens, outputs, weights, lambda block, q, _: negative_log_prob_grad(q, ids[block]))

    def _accumulate(
        self,
        tokens: Tensor,
        outputs: LinearOutputs,
        weights: Tensor,
        grad_of: Callable[[slice, Tensor, Tensor], Tensor],
    ) -> None:
        """Accumulate `weights` (n,) times the gradient at z/T that `grad_of` forms from q and log q of a block.

        The gradient overwrites `outputs.values`.
        """
        for block in slices(len(tokens), self.sizes.block):
            block_outputs = outputs.take(block)
            logits = block_outputs.logits()
            buffers = self._buffers(len(logits))
            q, log_q = softmax(logits, self.config.temperature, buffers.student_probs, buffers.student_log_probs)
            write_product(block_outputs.values, grad_of(block, q, log_q), outputs.softcap_grad(logits))
        self.student.accumulate(tokens, outputs.values, weights)

    def _buffers(self, tokens: int) -> BlockBuffers:
        return self.student.buffers(tokens, largest=self.sizes.block)
