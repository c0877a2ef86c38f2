#!/usr/bin/env bash
# On a machine with a GPU: the GPU tests, then the benchmark table. Needs no network, installs nothing into the machine's Python.
#
#     benchmarks/gpu.sh [argument of `python -m benchmarks` ..]
#
#     PYTHON=python3      the Python that has torch and triton
#     WHEELS=wheels       a folder of wheels (lark, platformdirs, ..) for what that Python lacks
#     RESULTS=benchmarks/results
#
# Ends within 9 minutes; what was measured by then is in $RESULTS/<device>.json and .md, and the tests' report in $RESULTS/<device>-tests.txt.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-wheels}
RESULTS=${RESULTS:-benchmarks/results}
SITE=$PWD/.gpu-site
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD:$SITE${PYTHONPATH:+:$PYTHONPATH}

missing=$("$PYTHON" - <<'EOF'
import importlib.util as u
needed = {"lark": "lark", "opt_einsum": "opt_einsum", "rich": "rich", "platformdirs": "platformdirs", "filelock": "filelock",
          "pytest": "pytest", "xdist": "pytest-xdist", "hypothesis": "hypothesis"}
print(*(package for module, package in needed.items() if u.find_spec(module) is None))
EOF
) || exit 1
if [ -n "$missing" ]; then
    # shellcheck disable=SC2086
    "$PYTHON" -m pip install --quiet --no-index --no-deps --find-links "$WHEELS" --target "$SITE" $missing || {
        echo "gpu.sh: $missing missing here; put the wheels into $WHEELS/" >&2
        exit 1
    }
fi

device=$("$PYTHON" -c '
import re, sys, torch
if not torch.cuda.is_available(): sys.exit("gpu.sh: torch sees no GPU")
print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))') || exit 1
mkdir -p "$RESULTS"
echo "== $device: the GPU tests"
timeout --kill-after=10 180 "$PYTHON" -m pytest tests -m gpu -q -n "${JOBS:-4}" -p no:cacheprovider 2>&1 | tee "$RESULTS/$device-tests.txt"
tests=$?
echo "== $device: the benchmarks"
timeout --kill-after=10 310 "$PYTHON" -m benchmarks --device cuda --budget 270 --seconds 0.4 \
    --json "$RESULTS/$device.json" --markdown "$RESULTS/$device.md" "$@"
table=$?
echo "== tests: exit $tests, benchmarks: exit $table; see $RESULTS/$device.md"
exit $((tests || table))
