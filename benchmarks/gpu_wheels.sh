#!/usr/bin/env bash
# The wheels that a GPU machine without network lacks for gpu_acceptance.sh: Linux x86-64, Python 3.12, torch 2.11.
#
#   bash benchmarks/gpu_wheels.sh FOLDER
#
# FOLDER is made anew; about 11 MB. DeepSpeed has no wheel: its sdist becomes a pure one (no operator is compiled, and
# none is where it is imported), by the torch of $PYTHON. torch, triton, numpy, transformers and what they need are there.
set -eu
[ $# -eq 1 ] || { echo "usage: bash benchmarks/gpu_wheels.sh FOLDER" >&2; exit 2; }
PYTHON=${PYTHON:-.venv/bin/python}
TRAIN="pydantic==2.14.4 pydantic_core==2.50.5 annotated_types==0.8.0 typing_inspection==0.4.5 typing_extensions==4.16.0
  hjson==3.1.0 pebble==5.2.3 math_verify==0.9.0 latex2sympy2_extended==1.11.0 antlr4_python3_runtime==4.13.2
  torchao==0.18.0"
PEERS="liger_kernel==0.8.5 cut_cross_entropy==25.1.1 flash_linear_attention==0.6.0 fla_core==0.6.0"
platforms=()
for name in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${name}_x86_64")
done
rm -rf "$1" && mkdir -p "$1"
"$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  "${platforms[@]}" --dest "$1" $TRAIN $PEERS
DS_BUILD_OPS=0 "$PYTHON" -m pip wheel --quiet --no-deps --no-build-isolation --no-binary deepspeed --wheel-dir "$1" deepspeed==0.19.8
ls -l "$1"
du -sh "$1"
