"""The two passes over chunks of tokens that compute the objective; docs/loss_without_logits.md derives the gradients.

The first pass forms each token's logits once and computes all values that the token's two distributions determine:
entropies, gate, divergence and the divergence's gradient. From the entropies, selection finds the openers and the most
uncertain tokens. The second pass forms the student's logits again, at these tokens alone. With a policy gradient it
reads all tokens again, because that term weights a token by its later tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tsdkd.core.chunk_sizes import ChunkSizes, slices
from tsdkd.core.config import TSDKDConfig
from tsdkd.core.gradients import BlockBuffers, negative_entropy_grad, negative_log_prob_grad, softmax, write_product
from tsdkd.core.lm_head import LinearOutputs
from tsdkd.core.metrics import RankedTokens, loss_metrics, to_grid
from tsdkd.core.objective import weighted_sum
from tsdkd.core.policy_gradient import SampledTokens, mean_future_rewards
from tsdkd.core.ranking import outside_mass, plackett_luce_grad, plackett_luce_nll
from tsdkd.core.selection import OpenerFraction, gated_weights, mean_weights, select_tokens
from tsdkd.core.student_logits import StudentLogits
from tsdkd.core.teacher_signals import TeacherSignal
from tsdkd.core.token_comparison import (
    TokenValues,
    compare_by_kernel,
    compare_compiled,
    compare_logits,
    compare_signal,
    concatenate,
    kernel_fits,
)


@dataclass(slots=True)
class TwoPasses:
    """One evaluation of the objective: `run` returns the value, the gradients accumulate in `student`.

    Weights of tokens, (tokens,), contain the mean over the batch's responses. Gradients in closed form are those at the
    tempered logits z/T; 1/T makes them gradients at z.
    """

    student: StudentLogits
    teacher: TeacherSignal
    response_mask: Tensor
    config: TSDKDConfig
    sampled: SampledTokens | None
    sizes: ChunkSizes
    compiled: bool
    _teacher_buffer: Tensor | None = None

    def run(self, opener_fraction: OpenerFraction | None) -> tuple[Tensor, dict[str, Tensor]]:
        """First pass, selection, second pass -> the loss, detached, and the metrics of `token_selective_loss`."""
        config, mask = self.config, self.response_mask
        values, direct, gate = self._first_pass()
        indirect, entropy = self._select(values, opener_fraction)
        policy = direct * mean_future_rewards(to_grid(values.reward, mask), mask)[mask]
        ranked = self._second_pass(indirect, entropy, policy, values)

        opener = indirect > 0
        terms: dict[str, Tensor] = {}
        if ranked is not None:
            nll = plackett_luce_nll(ranked.candidate_logits, "ranking" in config.released)
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
        metrics = loss_metrics(terms, means, to_grid(opener, mask), mask, ranked)
        norms = {f"{term}_grad_norm": self.student.grad_norm(term) for term in terms}
        return weighted_sum(terms, config), metrics | {name: norm for name, norm in norms.items() if norm is not None}

    def _first_pass(self) -> tuple[TokenValues, Tensor, Tensor]:
        """Compare both models at every token and accumulate the direct term's gradient.

        Returns the values, and the direct term's weights and gate (tokens,).
        """
        config, mask = self.config, self.response_mask
        inverse_length = mean_weights(mask)[mask].to(self.student.wide)
        values, weights, gates = [], [], []
        for chunk in slices(len(self.teacher), self.sizes.chunk):
            student = self.student.linear(chunk)
            compared = self._compare_chunk(student, self.teacher.take(chunk), self.sampled and self.sampled.take(chunk))
            weight, gate = gated_weights(
                compared.student_entropy, compared.teacher_entropy, inverse_length[chunk], config
            )
            weight = weight / len(mask) * compared.importance
            if config.direct_weight and self.student.requires_grad:
                grads = student.values  # the comparison has overwritten the linear outputs
                self.student.accumulate("direct", chunk, grads, config.direct_weight / config.temperature * weight)
            values.append(compared)
            weights.append(weight)
            gates.append(gate)
        return concatenate(values), torch.cat(weights), torch.cat(gates)

    def _compare_chunk(
        self, student: LinearOutputs, teacher: TeacherSignal, sampled: SampledTokens | None
    ) -> TokenValues:
        """Compare both models at a chunk's tokens; the divergence's gradient overwrites `student.values`."""
        return concatenate(
            [
                self._compare_teacher_chunk(
                    student.take(tokens), teacher.take(tokens), sampled and sampled.take(tokens)
                )
                for tokens in slices(len(student), self.sizes.teacher_chunk)
            ]
        )

    def _compare_teacher_chunk(
        self, student: LinearOutputs, teacher: TeacherSignal, sampled: SampledTokens | None
    ) -> TokenValues:
        """`_compare_chunk` for tokens whose teacher logits exist at the same time."""
        if teacher.vocab is None:
            recorded = (teacher.take(block) for block in self._blocks(student))
            return self._compare_blocks(compare_signal, student, recorded, sampled)
        outputs = teacher.linear_outputs(self._teacher_buffer)
        if self._teacher_buffer is None:
            self._teacher_buffer = outputs.values  # no later teacher chunk has more tokens
        if self.compiled and kernel_fits(student.values):
            return compare_by_kernel(student, outputs, self.config, sampled)
        teacher_logits = (outputs.take(block).logits() for block in self._blocks(student))  # one at a time
        compare = compare_compiled if self.compiled else compare_logits
        return self._compare_blocks(compare, student, teacher_logits, sampled)

    def _compare_blocks(
        self,
        compare: Callable[..., TokenValues],
        student: LinearOutputs,
        teacher_blocks: Iterator[TeacherSignal] | Iterator[Tensor],
        sampled: SampledTokens | None,
    ) -> TokenValues:
        values = []
        for block, teacher in zip(self._blocks(student), teacher_blocks, strict=True):
            logits = student.take(block).logits()
            softcap_grad = student.softcap_grad(logits)
            block_sampled = sampled and sampled.take(block)
            buffers = BlockBuffers() if self.compiled else self._buffers(len(logits))
            grad_out = student.in_vocab[block]
            values.append(compare(logits, teacher, softcap_grad, self.config, block_sampled, buffers, grad_out))
        return concatenate(values)

    def _select(self, values: TokenValues, opener_fraction: OpenerFraction | None) -> tuple[Tensor, Tensor]:
        """The weights of the indirect and the entropy term (tokens,)."""
        mask = self.response_mask
        entropies = to_grid(values.student_entropy, mask), to_grid(values.teacher_entropy, mask)
        indirect, entropy = select_tokens(*entropies, mask, self.config, opener_fraction)
        return indirect[mask] / len(mask), entropy[mask] / len(mask)

    def _second_pass(
        self, indirect: Tensor, entropy: Tensor, policy: Tensor, values: TokenValues
    ) -> RankedTokens | None:
        """Form the selected tokens' logits again and accumulate the gradients of all terms but the direct one.

        Takes the weights of the tokens in each term (tokens,). Returns the values of the opener's tokens; None without
        an indirect term.
        """
        config = self.config
        in_indirect = (indirect > 0) & (config.alpha > 0)
        in_entropy = (entropy > 0) & (config.em_weight > 0)
        in_policy = (policy != 0) & (config.policy_gradient_weight > 0)
        selected = (in_indirect | in_entropy | in_policy).nonzero().squeeze(-1)
        ranked = [self._no_ranked_tokens(values)]
        for chunk in slices(len(selected), self.sizes.chunk):
            tokens = selected[chunk]
            student = self.student.linear(tokens)
            if config.alpha:
                rows = in_indirect[tokens]
                ranked += self._accumulate_indirect(tokens[rows], student.take(rows), indirect, values)
            if config.em_weight and self.student.requires_grad:
                rows = in_entropy[tokens]
                self._accumulate_entropy(tokens[rows], student.take(rows), entropy, values.student_entropy)
            if self.sampled and self.student.requires_grad:
                rows = in_policy[tokens]
                self._accumulate_policy(tokens[rows], student.take(rows), policy, self.sampled.ids)
        return concatenate(ranked) if config.alpha else None

    def _no_ranked_tokens(self, values: TokenValues) -> RankedTokens:
        empty = values.student_entropy.new_empty(0)
        known = values.teacher_log_sum is not None
        return RankedTokens(empty.new_empty(0, self.config.k), empty, empty if known else None)

    def _accumulate_indirect(
        self, tokens: Tensor, student: LinearOutputs, indirect: Tensor, values: TokenValues
    ) -> list[RankedTokens]:
        """Returns the values of each block's tokens."""
        config, ranked = self.config, []
        for block in slices(len(tokens), self.sizes.indirect_block):
            logits, teacher = student.take(block).logits(), self.teacher.take(tokens[block])
            candidates = teacher.ranked_candidates(logits, config.k)
            chosen = logits.gather(-1, candidates).to(self.student.wide)
            scores = chosen / config.temperature
            weights = config.alpha / config.temperature * indirect[tokens[block]]
            grads = weights.unsqueeze(-1) * plackett_luce_grad(scores, "ranking" in config.released)
            softcap_grad = student.softcap_grad(chosen)
            grads = grads if softcap_grad is None else grads * softcap_grad
            self.student.accumulate_at("indirect", tokens[block], candidates, grads)
            student_mass = outside_mass(scores - values.student_log_sum[tokens[block]].unsqueeze(-1))
            teacher_log_sum = None if values.teacher_log_sum is None else values.teacher_log_sum[tokens[block]]
            teacher_mass = teacher.outside_mass(candidates, config.temperature, teacher_log_sum)
            ranked.append(RankedTokens(scores, student_mass, teacher_mass))
        return ranked

    def _accumulate_entropy(
        self, tokens: Tensor, student: LinearOutputs, entropy: Tensor, student_entropy: Tensor
    ) -> None:
        for block, logits, q, log_q in self._distributions(student):
            grad = negative_entropy_grad(q, log_q, student_entropy[tokens[block]])
            write_product(student.in_vocab[block], grad, student.softcap_grad(logits))
        weights = -self.config.em_weight / self.config.temperature * entropy[tokens]
        self.student.accumulate("entropy", tokens, student.values, weights)  # by now their gradients

    def _accumulate_policy(self, tokens: Tensor, student: LinearOutputs, policy: Tensor, ids: Tensor) -> None:
        for block, logits, q, _ in self._distributions(student):
            grad = negative_log_prob_grad(q, ids[tokens[block]])
            write_product(student.in_vocab[block], grad, student.softcap_grad(logits))
        weights = self.config.policy_gradient_weight * policy[tokens]
        self.student.accumulate("policy_gradient", tokens, student.values, weights)  # by now their gradients

    def _distributions(self, student: LinearOutputs) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Each block with its logits, q and log q, which are valid until the next block."""
        for block in self._blocks(student):
            logits = student.take(block).logits()
            buffers = self._buffers(len(logits))
            q, log_q = softmax(logits, self.config.temperature, buffers.student_probs, buffers.student_log_probs)
            yield block, logits, q, log_q

    def _blocks(self, student: LinearOutputs) -> Iterator[slice]:
        return slices(len(student), self.sizes.block)

    def _buffers(self, tokens: int) -> BlockBuffers:
        return self.student.buffers(tokens, largest=self.sizes.block)
