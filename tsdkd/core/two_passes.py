"""The two passes over chunks of tokens that compute an objective; docs/loss_without_logits.md derives the gradients.

The first pass forms each token's logits once and computes all values that the token's two distributions determine:
entropies, a divergence with its gradient, and the features that a selection reads. From these, the
`PassTerms` weight the tokens of every other loss. The second pass forms the logits again, only at tokens with a weight.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tsdkd.core.chunk_sizes import ChunkSizes, slices
from tsdkd.core.gradients import BlockBuffers, softmax
from tsdkd.core.lm_head import LinearOutputs
from tsdkd.core.loss_gradients import loss_and_grad
from tsdkd.core.losses import Entropy, Loss, PolicyGradient, Ranking, TokenBlock
from tsdkd.core.metrics import RankedTokens
from tsdkd.core.objective import weighted_sum
from tsdkd.core.pass_terms import PassTerms, TermWeights
from tsdkd.core.policy_gradient import SampledTokens
from tsdkd.core.ranking import outside_mass, plackett_luce_grad, plackett_luce_nll
from tsdkd.core.student_logits import StudentLogits
from tsdkd.core.teacher_signals import TeacherLogits, TeacherSignal
from tsdkd.core.token_comparison import (
    Comparison,
    TokenValues,
    compare_by_kernel,
    compare_compiled,
    compare_logits,
    compare_signal,
    concatenate,
    kernel_fits,
)

FeatureValues = dict[str, Tensor]
"""Features (tokens,), by name."""


@dataclass(slots=True)
class TwoPasses:
    """One evaluation of an objective: `run` returns the value, the gradients accumulate in `student`.

    Weights of tokens, (tokens,), contain the mean over the batch's responses. Gradients in closed form are those at the
    tempered logits z/T; 1/T makes them gradients at z.
    """

    student: StudentLogits
    teacher: TeacherSignal
    terms: PassTerms
    sizes: ChunkSizes
    compiled: bool
    _features: defaultdict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    _ranked: defaultdict[str, list[RankedTokens]] = field(default_factory=lambda: defaultdict(list))
    _teacher_buffer: Tensor | None = None

    def run(self) -> tuple[Tensor, dict[str, Tensor]]:
        """First pass, selection, second pass -> the loss, detached, and the metrics of `token_selective_loss`."""
        terms = self.terms
        values, first, features = self.first_pass()
        weights = terms.second_weights(values, features, first.weights)
        found = self._second_pass(weights, values)
        if terms.first:
            name, _ = terms.first
            weights, found = weights | {name: first}, found | {name: (first.weights * values.divergence).sum()}
        sums = {name: found[name] for name in terms.order}
        loss = weighted_sum(sums, {name: weights[name].factor for name in sums})
        ranked = {name: concatenate(blocks) for name, blocks in self._ranked.items()}
        metrics = terms.metrics(sums, values, weights, ranked)
        norms = {f"{name}_grad_norm": self.student.grad_norm(name) for name in sums}
        return loss, metrics | {name: norm for name, norm in norms.items() if norm is not None}

    def first_pass(self) -> tuple[TokenValues, TermWeights, FeatureValues]:
        """Compare both models at every token and accumulate the first term's gradient.

        Returns the values, the weights of the first term, and the features that the terms request.
        """
        terms = self.terms
        values, weights = [], []
        for chunk in slices(len(self.teacher), self.sizes.chunk):
            student = self.student.linear(chunk)
            compared = self._compare_chunk(student, self.teacher.take(chunk), chunk)
            term = terms.first_weights(compared, chunk)
            if terms.first and self.student.requires_grad:
                grads = student.values  # the comparison has overwritten the linear outputs
                self.student.accumulate(terms.first[0], chunk, grads, term.factor / terms.temperature * term.weights)
            values.append(compared)
            weights.append(term)
        features = {name: torch.cat(blocks) for name, blocks in self._features.items()}
        first = weights[0]._replace(weights=torch.cat([term.weights for term in weights]))
        return concatenate(values), first, features

    def _compare_chunk(self, student: LinearOutputs, teacher: TeacherSignal, chunk: slice) -> TokenValues:
        """Compare both models at a chunk's tokens; the divergence's gradient overwrites `student.values`."""
        return concatenate(
            [
                self._compare_teacher_chunk(student.take(tokens), teacher.take(tokens), chunk.start + tokens.start)
                for tokens in slices(len(student), self.sizes.teacher_chunk)
            ]
        )

    def _compare_teacher_chunk(self, student: LinearOutputs, teacher: TeacherSignal, start: int) -> TokenValues:
        """`_compare_chunk` for tokens whose teacher logits exist at the same time; `start`: the first token."""
        if teacher.vocab is not None and self.compiled and kernel_fits(student.values):
            sampled = self.terms.importance and self.terms.importance.take(slice(start, start + len(student)))
            return compare_by_kernel(student, self._teacher_outputs(teacher), self._comparison, sampled)
        return concatenate(
            [
                self._compare_block(student, block, logits, signal, start)
                for block, logits, signal in self._blocks(student, teacher)
            ]
        )

    def _compare_block(
        self, student: LinearOutputs, block: slice, logits: Tensor, teacher: TeacherSignal, start: int
    ) -> TokenValues:
        tokens = slice(start + block.start, start + block.stop)
        ids = None if self.terms.ids is None else self.terms.ids[tokens]
        for name, formed in self.terms.features.form(logits, teacher, ids).items():
            self._features[name].append(formed)
        compare: Callable[..., TokenValues] = compare_signal
        other: TeacherSignal | Tensor = teacher
        if isinstance(teacher, TeacherLogits):
            compare, other = compare_compiled if self.compiled else compare_logits, teacher.logits
        sampled: SampledTokens | None = self.terms.importance and self.terms.importance.take(tokens)
        buffers = BlockBuffers() if self.compiled else self._buffers(len(logits))
        grad_out = student.in_vocab[block]
        return compare(logits, other, student.softcap_grad(logits), self._comparison, sampled, buffers, grad_out)

    @property
    def _comparison(self) -> Comparison:
        return Comparison(self.terms.first[1] if self.terms.first else None, self.terms.temperature)

    def _blocks(
        self, student: LinearOutputs, teacher: TeacherSignal, *, whole: bool = True
    ) -> Iterator[tuple[slice, Tensor, TeacherSignal]]:
        """Each block with the student's logits and the teacher's signal.

        `whole`: with the teacher's logits, which are formed for all blocks at once, if the signal knows them.
        """
        outputs = self._teacher_outputs(teacher) if whole and teacher.vocab is not None else None
        for block in slices(len(student), self.sizes.block):
            signal = teacher.take(block) if outputs is None else TeacherLogits(outputs.take(block).logits())
            yield block, student.take(block).logits(), signal

    def _teacher_outputs(self, teacher: TeacherSignal) -> LinearOutputs:
        outputs = teacher.linear_outputs(self._teacher_buffer)
        if self._teacher_buffer is None:
            self._teacher_buffer = outputs.values  # no later teacher chunk has more tokens
        return outputs

    def _second_pass(self, weights: dict[str, TermWeights], values: TokenValues) -> dict[str, Tensor]:
        """Form the logits of tokens with a weight again and accumulate the gradients of all terms but the first.

        Returns the terms, without their factors.
        """
        known = {name: self._known_losses(name, term, values) for name, term in weights.items()}
        in_term = {
            name: term.weights != 0
            for name, term in weights.items()
            if known[name] is None or self.student.requires_grad
        }
        losses = {name: [values.divergence[:0]] for name in in_term}
        if in_term:
            selected = torch.stack(list(in_term.values())).any(0).nonzero().squeeze(-1)
            for chunk in slices(len(selected), self.sizes.chunk):
                tokens = selected[chunk]
                student = self.student.linear(tokens)
                for name, term_tokens in in_term.items():
                    rows = term_tokens[tokens]
                    losses[name] += self._accumulate(name, tokens[rows], student.take(rows), weights[name], values)
        terms = {}
        for name, term in weights.items():
            if (by_token := known[name]) is not None:
                terms[name] = (term.weights * by_token).sum()
            else:
                terms[name] = (term.weights[in_term[name]] * torch.cat(losses[name])).sum()
        return terms

    def _known_losses(self, name: str, term: TermWeights, values: TokenValues) -> Tensor | None:
        """The losses of all tokens (tokens,), where the first pass has computed them."""
        loss = self.terms.second[name]
        if isinstance(loss, Entropy) and self._has_pass_temperature(term):
            return values.student_entropy
        return -torch.ones_like(values.student_entropy) if isinstance(loss, PolicyGradient) else None

    def _has_pass_temperature(self, term: TermWeights) -> bool:
        return not isinstance(term.temperature, Tensor) and term.temperature == self.terms.temperature

    def _accumulate(
        self, name: str, tokens: Tensor, student: LinearOutputs, term: TermWeights, values: TokenValues
    ) -> list[Tensor]:
        """Accumulate a term's gradient at some tokens; their linear outputs are overwritten. Returns their losses."""
        loss = self.terms.second[name]
        if isinstance(loss, Ranking) and not loss.rest and self._has_pass_temperature(term):
            return self._accumulate_ranking(name, loss, tokens, student, term, values)
        return self._accumulate_loss(name, loss, tokens, student, term, values)

    def _accumulate_loss(
        self, name: str, loss: Loss, tokens: Tensor, student: LinearOutputs, term: TermWeights, values: TokenValues
    ) -> list[Tensor]:
        """`_accumulate` for gradients at the whole vocabulary."""
        losses: list[Tensor] = []
        temperature = term.temperature[tokens] if isinstance(term.temperature, Tensor) else term.temperature
        for part in slices(len(tokens), self.sizes.teacher_chunk):
            blocks = self._blocks(student.take(part), self.teacher.take(tokens[part]), whole=loss.needs != "responses")
            for block, logits, signal in blocks:
                own = slice(part.start + block.start, part.start + block.stop)
                divisor = temperature[own].unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
                buffers = self._buffers(len(logits))
                q, log_q = softmax(logits, divisor, buffers.student_probs, buffers.student_log_probs)
                ids = None if self.terms.ids is None else self.terms.ids[tokens[own]]
                entropy = values.student_entropy[tokens[own]] if self._has_pass_temperature(term) else None
                block_tokens = TokenBlock(log_q, signal, divisor, ids, entropy)
                softcap_grad = student.softcap_grad(logits)
                losses.append(loss_and_grad(loss, block_tokens, q, softcap_grad, buffers, student.in_vocab[own]))
        if self.student.requires_grad:
            weights = term.factor / temperature * term.weights[tokens]
            self.student.accumulate(name, tokens, student.values, weights)  # now the gradients
        return losses

    def _accumulate_ranking(
        self, name: str, loss: Ranking, tokens: Tensor, student: LinearOutputs, term: TermWeights, values: TokenValues
    ) -> list[Tensor]:
        """`_accumulate` for gradients at the candidates alone; keeps the values that the metrics need."""
        losses, temperature = [], self.terms.temperature
        for block in slices(len(tokens), self.sizes.indirect_block):
            own = tokens[block]
            logits, teacher = student.take(block).logits(), self.teacher.take(own)
            candidates = teacher.ranked_candidates(logits, loss.k)
            chosen = logits.gather(-1, candidates).to(self.student.wide)
            scores = chosen / temperature
            losses.append(plackett_luce_nll(scores, loss.released))
            weights = term.factor / temperature * term.weights[own]
            grads = weights.unsqueeze(-1) * plackett_luce_grad(scores, loss.released)
            softcap_grad = student.softcap_grad(chosen)
            grads = grads if softcap_grad is None else grads * softcap_grad
            self.student.accumulate_at(name, own, candidates, grads)
            student_mass = outside_mass(scores - values.student_log_sum[own].unsqueeze(-1))
            teacher_log_sum = None if values.teacher_log_sum is None else values.teacher_log_sum[own]
            teacher_mass = teacher.outside_mass(candidates, temperature, teacher_log_sum)
            self._ranked[name].append(RankedTokens(scores, student_mass, teacher_mass))
        return losses

    def _buffers(self, tokens: int) -> BlockBuffers:
        return self.student.buffers(tokens, largest=self.sizes.block)
