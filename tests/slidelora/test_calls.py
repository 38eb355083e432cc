"""docs/calls.md has a table of ways to call a model, and each of its rows has tests."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
GENERATE, FORWARD, AROUND, PICTURES, STATE = (
    "test_calls_generate.py", "test_calls_forward.py", "test_calls_around.py", "test_calls_pictures.py",
    "test_routing_state.py",
)  # fmt: skip

# The beginning of each row, its file, and the tests in it. Where a row has three gates, each test runs under all of
# them, or others in the same row do so.
ROWS: dict[str, tuple[str, list[str]]] = {
    "KV cache, `use_cache=False`": (GENERATE, ["test_generate", "test_the_mask_that_generate_infers_counts"]),
    "caches with a sliding window": (GENERATE, [
        "test_generate_with_a_sliding_window", "test_calls_that_continue_a_state",
    ]),
    "prompt lookup": (GENERATE, ["test_speculation"]),
    "beams": (GENERATE, ["test_generate", "test_sampled_sequences"]),
    "`inputs_embeds`": (GENERATE, ["test_what_generate_may_be_given", "test_generate"]),
    "guidance": (GENERATE, ["test_an_unconditional_prompt_has_the_gate_of_the_prompt", "test_generate"]),
    "pipelines": (GENERATE, ["test_pipelines"]),
    "a cache that is reordered": (GENERATE, ["test_the_gates_of_a_cache_follow_its_rows"]),
    "a cache that is reset": (GENERATE, ["test_a_cache_that_is_emptied"]),
    "a cache that another model filled": (GENERATE, ["test_a_cache_that_another_model_filled"]),
    "another turn": (GENERATE, ["test_another_turn", "test_the_last_weights_are_those_of_the_cache"]),
    "encoder-decoders |": (GENERATE, ["test_encoder_decoders", "test_the_output_of_another_encoder_is_refused"]),
    "encoder-decoders whose input": (GENERATE, ["test_encoder_decoders"]),
    "models with another state": (GENERATE, ["test_generate_with_a_state", "test_calls_that_continue_a_state"]),
    "RecurrentGemma and RWKV": (GENERATE, ["test_generate_with_a_state", "test_calls_that_continue_a_state"]),
    "RWKV with `rescale_every`": (GENERATE, ["test_layers_whose_host_scales_their_weights_are_refused"]),
    "`generate_batch`": (GENERATE, [
        "test_continuous_batching", "test_calls_beside_continuous_batching",
        "test_a_manager_that_is_kept_follows_the_gates",
    ]),
    "padding": (FORWARD, ["test_padding_on_either_side"]),
    "labels on the answer": (FORWARD, ["test_labels"]),
    "labels on every token": (FORWARD, ["test_labels"]),
    "labels of tags": (FORWARD, ["test_labels_of_the_input_change_no_logits"]),
    "no labels, in training": (FORWARD, [
        "test_training_without_labels", "test_a_prompt_that_is_told_goes_before_all_else",
    ]),
    "labels that the Trainer keeps": (FORWARD, ["test_label_smoothing_of_the_trainer"]),
    "scoring": (FORWARD, ["test_what_was_generated_is_scored_under_the_same_gates"]),
    "an `attention_mask` that is 4-D": (FORWARD, ["test_masks_of_other_kinds"]),
    "samples packed into a row": (FORWARD, [
        "test_samples_that_are_packed_into_a_row", "test_the_gate_finds_the_packed_samples",
    ]),
    "the rest of a sequence": (FORWARD, ["test_the_rest_of_a_sequence_without_its_cache"]),
    "time before batch": (FORWARD, ["test_layers_that_see_time_first"]),
    "a layer that gets some of the tokens": (FORWARD, ["test_a_layer_that_gets_some_of_the_tokens"]),
    "pictures of LLaVA": (PICTURES, ["test_llava", "test_qwen", "test_gates_that_are_repeated_for_beams"]),
    "pictures in `(B, n, C, H, W)`": (PICTURES, ["test_idefics"]),
    "videos, sound": (PICTURES, ["test_media_whose_samples_are_not_known", "test_pictures_beside_embeddings"]),
    "KeyboardInterrupt": (AROUND, ["test_an_interrupt_leaves_nothing_in_force"]),
    "a call within a call": (AROUND, ["test_a_call_within_a_call_has_its_own_gates"]),
    "a call within `generate`": (AROUND, ["test_a_call_within_generate"]),
    "threads, asyncio tasks": (AROUND, [
        "test_two_threads_make_a_thousand_calls_each", "test_asyncio_tasks_under_gates_of_their_own",
    ]),
    "contexts that end": (AROUND, ["test_contexts_that_end_out_of_order"]),
    "a context that a generator holds": (AROUND, [
        "test_generators_that_hold_a_context", "test_a_context_that_ends_in_another_thread_is_named",
    ]),
    "activation checkpointing inside": (STATE, [
        "test_checkpointing_needs_no_arguments", "test_checkpointing_of_an_encoder_decoder",
    ]),
    "reentrant checkpointing and": (STATE, ["test_a_loss_without_a_gradient_is_refused"]),
    "`torch.utils.checkpoint.checkpoint` around": (STATE, [
        "test_checkpointing_of_a_whole_model", "test_checkpointing_of_a_whole_model_without_arguments",
    ]),
}  # fmt: skip


REFUSED_BEFORE = ("RWKV with `rescale_every`",)  # there is no model to call


def test_each_row_of_the_table_has_tests() -> None:
    lines = (ROOT / "docs/calls.md").read_text().splitlines()
    rows = [line[2:] for line in lines if line.startswith("| ") and not line.startswith("| way |")]
    for row in rows:
        assert sum(row.startswith(title) for title in ROWS) == 1, row
    for title, (name, tests) in ROWS.items():
        assert any(row.startswith(title) for row in rows), title
        tree = ast.parse((ROOT / "tests/slidelora" / name).read_text())
        defined = {node.name: node.decorator_list for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert tests and set(tests) <= set(defined), (title, set(tests) - set(defined))
        cells = next(row for row in rows if row.startswith(title)).count(" | ")
        under_all = any(
            isinstance(mark, ast.Name) and mark.id == "every_gate" for test in tests for mark in defined[test]
        )
        assert cells < 3 or under_all or title in REFUSED_BEFORE, title
