"""Seeded faults: each is one change to the source and a test that must then fail (`test_mutations.py`).

They are the mistakes seen in other implementations of the paper, and those that our own rules invite.
"""

from typing import NamedTuple


class Mutation(NamedTuple):
    """One fault: in `file`, `old` (which stands there once) becomes `new`; `test` catches it."""

    name: str
    file: str
    old: str
    new: str
    test: str


def step(example: str) -> str:
    return f"test_trainer.py::test_a_step_equals_the_formula[{example}]"


STORED_SCORES = "test_score.py::test_stored_scores_are_the_reference_s_losses_and_entropies_on_full_logits"
FROZEN = "test_score.py::test_the_reference_is_scored_frozen_and_in_eval_mode"
NO_LABEL = "test_objective.py::test_first_and_special_and_ignored_tokens_have_no_label"
EQ_5 = "test_objective.py::test_eq_5_selects_the_rounded_share_by_rank_and_ties_go_to_the_earlier_token"
WHOLE_ANSWERS = "test_conversations.py::test_answers_and_their_end_have_labels_and_a_conversation_is_never_cut"
BORDERS = "test_trajectories.py::test_a_change_of_just_the_threshold_is_no_change_and_a_loss_of_just_the_border_is_low"

MUTATIONS = [
    Mutation(
        "hidden states are not shifted",
        "objective.py",
        "return F.pad(states_BTX[:, :-1], (0, 0, 1, 0))",
        "return states_BTX",
        "test_objective.py::test_the_one_shift_moves_every_row_one_down_and_nothing_predicts_a_first_token",
    ),
    Mutation(
        "hidden states are shifted twice",
        "forward.py",
        "predictors(hidden_BTD),",
        "predictors(predictors(hidden_BTD)),",
        step("excess-sequence"),
    ),
    Mutation(
        "first tokens keep their label",
        "objective.py",
        "without = position_ids_BT == 0",
        "without = position_ids_BT < 0",
        NO_LABEL,
    ),
    Mutation(
        "special tokens are eligible",
        "objective.py",
        "without = without | torch.isin(input_ids_BT, special_ids)",
        "pass",
        NO_LABEL,
    ),
    Mutation(
        "tokens whose score is NaN are eligible",
        "selection.py",
        "eligible = eligible & columns[name].isfinite()",
        "pass",
        "test_selection.py::test_tokens_without_label_or_score_are_neither_selected_nor_counted",
    ),
    Mutation(
        "the denominator is each micro-batch's own count",
        "mixin.py",
        'loss = outputs["loss"] / num_items_in_batch * self.accelerator.num_processes',
        'loss = outputs["loss"] / outputs["selected"].sum().clamp(min=1)',
        step("excess-sequence"),
    ),
    Mutation(
        "the loss is a mean of the micro-batches' means",
        "mixin.py",
        'loss = outputs["loss"] / num_items_in_batch * self.accelerator.num_processes',
        'loss = outputs["loss"] / outputs["selected"].sum().clamp(min=1) / self._step.micro_batches',
        step("excess-step"),
    ),
    Mutation(
        "the denominator is the number of eligible tokens",
        "mixin.py",
        'loss = outputs["loss"] / num_items_in_batch * self.accelerator.num_processes',
        'loss = outputs["loss"] / outputs["eligible"].sum()',
        step("excess-batch"),
    ),
    Mutation(
        "the mask is inverted",
        "objective.py",
        "chosen = eligible_in_order & (eligible_in_order.cumsum(-1) <= wanted)",
        "chosen = eligible_in_order & (eligible_in_order.cumsum(-1) > wanted)",
        EQ_5,
    ),
    Mutation(
        "ties select more than k",
        "objective.py",
        "chosen = eligible_in_order & (eligible_in_order.cumsum(-1) <= wanted)",
        "in_order = score_RN.masked_fill(~eligible_RN, -torch.inf).gather(-1, order)\n"
        "    chosen = eligible_in_order & (in_order >= in_order.gather(-1, (wanted - 1).clamp(min=0)))",
        EQ_5,
    ),
    Mutation(
        "k is rounded up",
        "objective.py",
        "torch.round(num_eligible.double() * ratio)",
        "torch.ceil(num_eligible.double() * ratio)",
        "test_objective.py::test_the_count_rounds_as_python_does_and_is_no_float_trap",
    ),
    Mutation(
        "the excess is absolute",
        "objective.py",
        "return loss_BT - ref_loss_BT",
        "return (loss_BT - ref_loss_BT).abs()",
        "test_objective.py::test_eq_3_is_the_signed_difference",
    ),
    Mutation(
        "the excess has the other sign",
        "objective.py",
        "return loss_BT - ref_loss_BT",
        "return ref_loss_BT - loss_BT",
        "test_objective.py::test_eq_3_is_the_signed_difference",
    ),
    Mutation(
        "logits are taken for log-probabilities",
        "linear_loss.py",
        "loss_R[part] = (total.log() + (top - target)).squeeze(-1)",
        "loss_R[part] = -target.squeeze(-1)",
        "test_linear_loss.py::test_token_losses_and_entropies_equal_the_slow_twin",
    ),
    Mutation(
        "rows that were guessed wrong are left as they are",
        "linear_loss.py",
        "weight_N[some] - used_N[some], weight_N[some]",
        "0.0 * weight_N[some], used_N[some]",
        "test_linear_loss.py::test_a_guess_may_be_as_wrong_as_it_likes",
    ),
    Mutation(
        "the kept rows' exponentials are taken from other rows",
        "linear_loss.py",
        "place_K[gaps] = beyond",
        "pass",
        "test_linear_loss.py::test_loss_mask_and_gradients_equal_the_formula[sequence-plain]",
    ),
    Mutation(
        "the gradient forgets the scale of the logits",
        "linear_loss.py",
        "factor_K1 = self.head.scale / total_K1",
        "factor_K1 = 1.0 / total_K1",
        "test_linear_loss.py::test_loss_mask_and_gradients_equal_the_formula[clm-scale]",
    ),
    Mutation(
        "the gradient forgets the cap of the logits",
        "linear_loss.py",
        "grad_KV *= self.slope_RV[kept_K]",
        "pass",
        "test_linear_loss.py::test_loss_mask_and_gradients_equal_the_formula[clm-cap]",
    ),
    Mutation(
        "the reference scores in train mode",
        "references/model.py",
        "return model.to(device()).eval().requires_grad_(False)",
        "return model.to(device()).train().requires_grad_(False)",
        FROZEN,
    ),
    Mutation(
        "the reference receives gradients",
        "references/model.py",
        "return model.to(device()).eval().requires_grad_(False)",
        "return model.to(device()).eval()",
        FROZEN,
    ),
    Mutation(
        "the reference's losses are stored one place off",
        "score.py",
        "np.concatenate(values) for name",
        "np.roll(np.concatenate(values), -1, 1) for name",
        STORED_SCORES,
    ),
    Mutation(
        "the random score ignores the step",
        "selection.py",
        "_mix(_mix(torch.tensor(seed, device=block_B.device)) + draw)",
        "_mix(_mix(torch.tensor(seed, device=block_B.device)))",
        "test_selection.py::test_random_scores_depend_on_seed_step_and_block_but_not_on_the_batch",
    ),
    Mutation(
        "retention is subtracted",
        "mixin.py",
        "active.retention * asked.clamp(min=1)",
        "-active.retention * asked.clamp(min=1)",
        step("retention"),
    ),
    Mutation(
        "soft weights are not normalised",
        "selection.py",
        "return (weight / mean.clamp(min=torch.finfo(weight.dtype).tiny)).view(shape)",
        "return weight.view(shape)",
        "test_selection.py::test_soft_weights_follow_their_formulas",
    ),
    Mutation(
        "the count of a running threshold is not put right",
        "mixin.py",
        "correction = step.asked / actual",
        "correction = 1.0",
        step("excess-running"),
    ),
    Mutation(
        "ties of a step go by rank before micro-batch",
        "selection.py",
        "position = all_micros.argsort(stable=True)",
        "position = torch.arange(len(all_micros))",
        "test_selection.py::test_ties_of_a_step_go_by_micro_batch_before_rank",
    ),
    Mutation(
        "every epoch has the same order",
        "data.py",
        "default_rng([self.seed, self.epoch])",
        "default_rng([self.seed])",
        "test_trainer.py::test_rows_come_once_an_epoch_in_an_order_of_the_epochs_own",
    ),
    Mutation(
        "a resumed run reads the data from the start",
        "train.py",
        '"disable_tqdm": True,',
        '"disable_tqdm": True, "ignore_data_skip": True,',
        "test_train.py::test_an_interrupted_run_ends_bit_identical[excess]",
    ),
    Mutation(
        "page checksums are not verified",
        "store.py",
        "page_checksum_verification=True)",
        "page_checksum_verification=False)",
        "test_store.py::test_pages_are_checked_at_every_read_not_only_when_the_file_is_opened",
    ),
    Mutation(
        "an API's answer is taken whatever text it is for",
        "references/answers.py",
        "if scored not in (sent, None):",
        "if False:",
        "test_api.py::test_answers_that_two_requests_exchange_are_not_taken",
    ),
    Mutation(
        "isolated documents are sent to an API as one text",
        "references/api.py",
        "starts = [*(positions_T == 0).nonzero().flatten().tolist(), len(positions_T)]",
        "starts = [0, len(positions_T)]",
        "test_api.py::test_each_isolated_document_is_one_request_and_one_of_a_single_token_none[vllm]",
    ),
    Mutation(
        "tokens that fall and tokens that rise are taken for each other",
        "trajectories.py",
        "[UNCLASSIFIED, FALLING, RISING]",
        "[UNCLASSIFIED, RISING, FALLING]",
        "test_trajectories.py::test_one_trajectory_of_each_class",
    ),
    Mutation(
        "a change of just the threshold counts",
        "trajectories.py",
        "change < -threshold",
        "change <= -threshold",
        BORDERS,
    ),
    Mutation(
        "low and high are told apart by the mean of all checkpoints",
        "trajectories.py",
        "float(losses[:, -1].sum())",
        "float(losses.mean(1).sum())",
        "test_trajectories.py::test_the_mean_is_that_of_the_last_checkpoint",
    ),
    Mutation(
        "a loss of just the border is high",
        "trajectories.py",
        ".astype(np.float64) > border",
        ".astype(np.float64) >= border",
        BORDERS,
    ),
    Mutation(
        "labels that are shifted in the data are not",
        "objective.py",
        "return F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)",
        "return labels_BT",
        "test_selective.py::test_labels_shifted_in_the_data_are_predicted_by_the_same_rows",
    ),
    Mutation(
        "a score of zero is a missing score",
        "integrations/labels.py",
        "score = torch.where(score == 0, -0.0, score)",
        "pass",
        "test_labels.py::test_a_score_of_zero_is_no_missing_score",
    ),
    Mutation(
        "a first token's label counts",
        "objective.py",
        "labels_BT.masked_fill(torch.arange(labels_BT.shape[1], device=labels_BT.device) == 0, IGNORE_INDEX)",
        "labels_BT",
        "test_objective.py::test_a_label_of_a_first_token_is_passed_over_as_transformers_does",
    ),
    Mutation(
        "plain labels pass for labels with scores",
        "integrations/labels.py",
        "missing = ~ignored & ~_holds_score(labels)",
        "missing = torch.zeros_like(ignored)",
        "test_labels.py::test_labels_without_scores_are_refused_also_among_others",
    ),
    Mutation(
        "in a plain loop each micro-batch divides by its own count",
        "selective.py",
        "own if num_selected is None else num_selected",
        "own",
        "test_selective.py::test_micro_batches_that_divide_by_one_count_add_up",
    ),
    Mutation(
        "a token of weight 0 is counted",
        "selection.py",
        "eligible = eligible & (columns[name] != 0)",
        "pass",
        "test_integrations.py::test_weights_of_one_and_zero_are_a_mask",
    ),
    Mutation(
        "a loss that is told the number of labels divides by all of them",
        "integrations/by_labels.py",
        'found["loss"] / num_labels / share',
        'found["loss"] / num_labels',
        "test_integrations.py::test_compute_loss_func",
    ),
    Mutation(
        "examples that are packed together are ranked together",
        "mixin.py",
        "if bounds is not None and",
        "if False and",
        "test_integrations.py::test_a_padding_free_batch_ranks_each_sequence_by_itself",
    ),
    Mutation(
        "questions have labels",
        "corpus.py",
        "labels = token_labels(input_ids, position_ids, ignore=torch.from_numpy(~row[LOSS_MASK]))",
        "labels = token_labels(input_ids, position_ids)",
        WHOLE_ANSWERS,
    ),
    Mutation(
        "a conversation is cut at the end of a block",
        "corpus.py",
        "if len(ids) + 1 > self.room(split):",
        "if False:",
        WHOLE_ANSWERS,
    ),
    Mutation(
        "a token that begins in the question has a label",
        "conversations.py",
        "mask[:-1] |= (begins >= start) & (reached > start) & (reached <= end)",
        "mask[:-1] |= (reached > start) & (reached <= end)",
        "test_conversations.py::test_a_token_that_begins_in_the_prompt_is_not_trained_on",
    ),
    Mutation(
        "what was learned is ranked upside down",
        "selection.py",
        'return -excess_BT if self.score == "retrospective" else excess_BT',
        "return excess_BT",
        "test_selection.py::test_each_score_ranks_by_its_own_rule",
    ),
    Mutation(
        "a resumed run begins a new history",
        "trainer.py",
        "self.history.load(checkpoint)",
        "pass",
        "test_history.py::test_an_interrupted_run_ends_bit_identical[sequence-history0]",
    ),
    Mutation(
        "the history is renewed before it is compared with",
        "mixin.py",
        "            with self.history.in_place():\n",
        "            self.history.follow(self.state.global_step)\n            with self.history.in_place():\n",
        "test_history.py::test_the_tokens_that_gained_most_since_then_are_selected[1]",
    ),
    Mutation(
        "of rejected answers too the tokens of the highest reward are selected",
        "integrations/preference.py",
        "wanted_B1[len(reward_BT) // 2 :] = -1.0",
        "pass",
        "test_preference.py::test_a_hand_made_case",
    ),
    Mutation(
        "an oracle's reward has the wrong sign",
        "integrations/preference.py",
        "for model in (before, oracle)))",
        "for model in (oracle, before)))",
        "test_preference.py::test_rewards_are_what_the_oracle_gained_on_each_token[4]",
    ),
    Mutation(
        "pairs are trained on all of their tokens",
        "integrations/trl_dpo.py",
        'inputs["completion_mask"] = selected_BT.to(inputs["completion_mask"].dtype)',
        "pass",
        "test_preference.py::test_selected_tokens_give_the_literal_loss_and_gradient[False]",
    ),
    Mutation(
        "SePO's loss has a reference",
        "integrations/trl_dpo.py",
        "self.precompute_ref_logps, self.ref_model = False, _no_reference",
        "self.precompute_ref_logps, self.ref_model = False, self.model",
        "test_preference.py::test_selected_tokens_give_the_literal_loss_and_gradient[True]",
    ),
    Mutation(
        "rewards are not cut as tokens are",
        "integrations/trl_dpo.py",
        'nothing = [[float("nan")] * len(row["prompt_ids"]) for row in rows]',
        'nothing = [[float("nan")] * (len(row["prompt_ids"]) - 1) for row in rows]',
        "test_preference.py::test_rewards_stay_with_their_tokens_where_trl_cuts_and_pads[keep_end-7]",
    ),
    Mutation(
        "a token that nothing predicts is selected",
        "integrations/preference.py",
        "return token_labels(input_ids_BT, positions(input_ids_BT), ignore=answer_BT == 0)",
        "return token_labels(input_ids_BT, positions(input_ids_BT) + 1, ignore=answer_BT == 0)",
        "test_preference.py::test_rewards_stay_with_their_tokens_where_trl_cuts_and_pads[keep_end-4]",
    ),
    Mutation(
        "pairs are evaluated on selected tokens",
        "integrations/trl_dpo.py",
        "if self.model.training and active.selective:",
        "if reward_BT is not None and active.selective:",
        "test_preference.py::test_evaluation_is_trls_own_with_or_without_rewards",
    ),
    Mutation(
        "pairs whose rewards got lost are trained on as they are",
        "integrations/trl_dpo.py",
        "if self.model.training and active.selective:",
        "if self.model.training and active.selective and reward_BT is not None:",
        "test_preference.py::test_rewards_that_get_lost_on_the_way_are_an_error",
    ),
]
