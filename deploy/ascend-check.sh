#!/bin/bash
# Checks and measures an Ascend host, and writes a report in Markdown for docs/ASCEND.md:
#   deploy/ascend-check.sh --report report.md
# It starts a broker and a datasystem worker of its own, and ends them. Options: --help. The Python environment is
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
for python in "${PYTHON:-}" /opt/weight-broker/bin/python "$checkout/.venv/bin/python" python3; do
  if [ -n "$python" ] && "$python" -c 'import weight_broker, weight_brokerd, yr.datasystem' 2>/dev/null; then
    exec "$python" -m weight_brokerd.ascend_check.__main__ "$@"
  fi
done
echo "No Python with weight-broker[broker] and openyuanrong-datasystem; name it: PYTHON=/path/to/python $0" >&2
exit 2
