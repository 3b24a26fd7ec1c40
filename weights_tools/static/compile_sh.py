"""compile.sh, which makes one bmodel of the exported files with TPU-MLIR, as the published script does."""

from __future__ import annotations

from collections.abc import Collection

from weights_tools.static.modes import HEAD, MODES, Modes

NAME = "compile.sh"
SCRIPT = r"""#!/bin/bash
# ONNX files -> one bmodel for BM1684X, with TPU-MLIR (model_transform.py, model_deploy.py and model_tool on PATH).
# usage: ./compile.sh [--mode {choices}] [--name llama3.2-11b] [--seq_length {seq}] [--addr_mode io_alone] [--jobs 4]
# --mode: for all blocks and the head; without it, as exported (below). Run it again and it goes on where it stopped.
set -e
refuse() {{
    echo "$0: $*" >&2
    exit 2
}}
mode= name=llama3.2-11b label={label} addr= jobs=4
while [[ $# -gt 0 ]]; do
    case $1 in
    --mode) mode=$2 label=$2 ;;
    --name) name=$2 ;;
    --seq_length) [[ $2 == {seq} ]] || refuse "--seq_length $2: the files are of {seq}; export them anew" ;;
    --addr_mode) [[ $2 == io_alone ]] || refuse "--addr_mode $2: io_alone or nothing"
        addr="--addr_mode io_alone" ;;
    --jobs) jobs=$2 ;;
    *) refuse "$1: no such option; see the first lines of $0" ;;
    esac
    [[ $# -ge 2 ]] || refuse "$1: needs a value"
    shift 2
done

quantize() {{
    case $1 in
{cases}
    *) refuse "--mode $1: {choices}" ;;
    esac
}}
[[ -z $mode ]] || quantize $mode > /dev/null

here=$(cd "$(dirname "$0")" && pwd)
out=$here/compiled/$label${{addr:+_io_alone}}

# compile NETWORK FILE OPTIONS...
compile() {{
    local network=$1 file=$2
    shift 2
    [[ ! -e $out/$network/$network.bmodel ]] || return 0
    rm -rf "$out/$network.partial"
    mkdir -p "$out/$network.partial"
    (
        cd "$out/$network.partial" &&
        model_transform.py --model_name $network --model_def "$here/$file.onnx" --mlir $network.mlir &&
        model_deploy.py --mlir $network.mlir "$@" --chip bm1684x --model $network.bmodel &&
        rm -f ./*.npz ./*.onnx
    ) && mv "$out/$network.partial" "$out/$network"
}}

# block NUMBER MODE: its two forms
block() {{
    local options
    options=$(quantize ${{mode:-$2}}) &&
    compile block_$1 block_$1 $options --quant_input --quant_output &&
    compile block_cache_$1 block_cache_$1 $options --quant_input --quant_output $addr
}}

# background COMMAND...: at most $jobs at once
background() {{
    while (( $(jobs -rp | wc -l) >= jobs )); do sleep 0.2; done
    "$@" &
    pids+=($!)
}}

pids=() failed=
compile embedding embedding --quantize BF16 --quant_output
compile embedding_cache embedding_cache --quantize BF16 --quant_output
compile lm_head lm_head $(quantize ${{mode:-{head}}}) --quant_input
compile greedy_head greedy_head
compile penalty_sample_head penalty_sample_head
{blocks}
compile vit vision_transformer --quantize BF16 --quant_output
for pid in "${{pids[@]}}"; do wait $pid || failed=1; done
[[ -z $failed ]] || refuse "blocks failed, see above; run it again to go on"

# The cross-attention blocks come last but for the vision encoder: the device's addresses are assigned in this order.
models=
for network in embedding embedding_cache lm_head greedy_head penalty_sample_head {order} vit; do
    models+=" $out/$network/$network.bmodel"
done
model_tool --combine $models -o "$here/$name-vision_${{label}}_{seq}seq.bmodel"
"""


def compile_script(modes: Modes, seq_length: int, num_layers: int, cross_layers: Collection[int]) -> str:
    used = modes.used(num_layers)
    ordered = sorted(range(num_layers), key=lambda number: number in cross_layers)
    return SCRIPT.format(
        choices="|".join(MODES),
        label=used.pop() if len(used) == 1 else "mixed",
        cases="\n".join(f'    {mode}) echo "{options}" ;;' for mode, options in MODES.items()),
        seq=seq_length,
        head=modes.mode(HEAD),
        blocks="\n".join(f"background block {number} {modes.mode(str(number))}" for number in range(num_layers)),
        order=" ".join(f"block_{number} block_cache_{number}" for number in ordered),
    )
