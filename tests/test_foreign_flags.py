"""Every setting of SGLang's page is known: it works, changes nothing, or ends the start with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from sightline.config import ServerConfig, declared, foreign_flags
from sightline.foreign_flags import FOREIGN_FLAGS

# The fields of the line `server_args=ServerArgs(...)` that the page prints, in its order.
PRINTED = """model_path tokenizer_path tokenizer_mode skip_tokenizer_init load_format trust_remote_code dtype kv_cache_dtype
quantization quantization_param_path context_length device served_model_name chat_template completion_template is_embedding
revision host port mem_fraction_static max_running_requests max_total_tokens chunked_prefill_size max_prefill_tokens
schedule_policy schedule_conservativeness cpu_offload_gb page_size tp_size stream_interval stream_output random_seed
constrained_json_whitespace_pattern watchdog_timeout dist_timeout download_dir base_gpu_id gpu_id_step log_level log_level_http
log_requests log_requests_level show_time_cost enable_metrics decode_log_interval api_key file_storage_path enable_cache_report
reasoning_parser dp_size load_balance_method ep_size dist_init_addr nnodes node_rank json_model_override_args lora_paths
max_loras_per_batch lora_backend attention_backend sampling_backend grammar_backend speculative_algorithm
speculative_draft_model_path speculative_num_steps speculative_eagle_topk speculative_num_draft_tokens
speculative_accept_threshold_single speculative_accept_threshold_acc speculative_token_map enable_double_sparsity
ds_channel_config_path ds_heavy_channel_num ds_heavy_token_num ds_heavy_channel_type ds_sparse_decode_threshold
disable_radix_cache disable_cuda_graph disable_cuda_graph_padding enable_nccl_nvls disable_outlines_disk_cache
disable_custom_all_reduce disable_mla disable_overlap_schedule enable_mixed_chunk enable_dp_attention enable_ep_moe
enable_deepep_moe enable_torch_compile torch_compile_max_bs cuda_graph_max_bs cuda_graph_bs torchao_config
enable_nan_detection enable_p2p_check triton_attention_reduce_in_fp32 triton_attention_num_kv_splits
num_continuous_decode_steps delete_ckpt_after_loading enable_memory_saver allow_auto_truncate
enable_custom_logit_processor tool_call_parser enable_hierarchical_cache hicache_ratio enable_flashinfer_mla
enable_flashmla flashinfer_mla_disable_ragged warmups debug_tensor_dump_output_folder debug_tensor_dump_input_file
debug_tensor_dump_inject""".split()

FOREIGN = foreign_flags(ServerConfig)
OURS = {flag for _, spellings, *_ in declared(ServerConfig) for flag in spellings}


def load(*argv: str, env: dict[str, str] | None = None) -> ServerConfig:
    return ServerConfig.load(argv, env=env or {})


def refusal(capsys: pytest.CaptureFixture[str], *argv: str, env: dict[str, str] | None = None) -> str:
    with pytest.raises(SystemExit) as ended:
        load(*argv, env=env)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", PRINTED)
def test_every_printed_setting_is_known(name: str) -> None:
    assert len(PRINTED) == 112
    flag = f"--{name.replace('_', '-')}"
    assert flag in OURS or any(flag in foreign.options for foreign in FOREIGN), f"{flag} is unknown"


@pytest.mark.parametrize("foreign", FOREIGN, ids=lambda foreign: foreign.names[0])
def test_what_the_table_says_happens(foreign, capsys: pytest.CaptureFixture[str]) -> None:
    plain = load("model")
    for option in foreign.options:
        if not foreign.switch:
            err = refusal(capsys, "--model", "model", option, "something-else")
            assert err.startswith(f"sightline serve: {foreign.options[0]}: ")
            assert foreign.why in err
        elif not foreign.accepted:
            assert foreign.why in refusal(capsys, "model", option)
        for value in foreign.accepted:
            given = "model" if value == "=model" else value
            assert load("model", option, *([] if foreign.switch else [given])) == plain


def test_no_spelling_stands_twice() -> None:
    names = [option for foreign in FOREIGN_FLAGS for option in foreign.options]
    assert len(names) == len(set(names))


def test_every_reason_names_a_flag_that_exists() -> None:
    for foreign in FOREIGN:
        for word in foreign.why.split():
            if word.startswith("--"):
                assert word.rstrip(",;:.") in OURS, foreign


def test_files_and_environment_know_them_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("gpu_id_step: 1\nquantization: null\nenable_torch_compile: false\nport: 1001\n")
    assert load("--config", str(file)).port == 1001
    file.write_text("base_gpu_id: 2\n")
    assert "--base-gpu-id: choose the device" in refusal(capsys, "--config", str(file))
    assert "--gpu-id-step: choose the device" in refusal(capsys, env={"SIGHTLINE_GPU_ID_STEP": "2"})
    assert load(env={"SIGHTLINE_GPU_ID_STEP": "1"}) == load()


def test_a_mistyped_variable_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean SIGHTLINE_PORT?" in refusal(capsys, env={"SIGHTLINE_PROT": "1"})
    assert load(env={"SIGHTLINE_IS_IN_CI": "1"}) == load()
