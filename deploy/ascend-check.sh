#!/bin/bash
# Checks and measures an Ascend host, and writes a report in Markdown for docs/ASCEND.md:
#   deploy/ascend-check.sh --report report.md
# It starts a broker and a datasystem worker of its own, and ends them. Options: --help.
#   deploy/ascend-check.sh --prove
# Asks the driver what its source says, in about three minutes and without a model: prints a table, writes proof.json
# (`weight-broker doctor --prove`; more options: --prove --help). Run this one first. The Python environment is
# $PYTHON, else that of /opt/weight-broker, else .venv of this checkout, else python3; it needs
#   pip install 'weight-broker[broker,cli]' openyuanrong-datasystem, torch for the random model, and torch_npu if its
#   tensors are to be measured.
set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ -z "${ASCEND_HOME_PATH:-}" ]; then
  for file in /usr/local/Ascend/ascend-toolkit/set_env.sh /usr/local/Ascend/cann/set_env.sh; do
    # shellcheck disable=SC1090
    if [ -f "$file" ]; then set +u; . "$file"; set -u; break; fi
  done
fi
if [ "${1:-}" = --prove ]; then
  shift
  needed='import weight_brokerd.proof'
  program=(weight_brokerd.proof npu)
else
  needed='import weight_broker, weight_brokerd, yr.datasystem'
  program=(weight_brokerd.ascend_check.__main__)
fi
for python in "${PYTHON:-}" /opt/weight-broker/bin/python "$checkout/.venv/bin/python" python3; do
  if [ -n "$python" ] && "$python" -c "$needed" 2>/dev/null; then
    exec "$python" -m "${program[@]}" "$@"
  fi
done
echo "No Python with weight-broker[broker] and openyuanrong-datasystem; name it: PYTHON=/path/to/python $0" >&2
exit 2
