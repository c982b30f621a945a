#!/bin/sh
# The C code under AddressSanitizer and UndefinedBehaviorSanitizer: first without Python, where leaks can be told, then
# as the extension under the unit tests. Builds in a private directory; the tree's own extension is left alone.
# Usage: tests/asan/run.sh [PYTHON]
set -eu
cd "$(dirname "$0")/../.."
python=$(realpath -s "${1:-.venv/bin/python}")
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
flags="-g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined -D_GNU_SOURCE"
sources=$(find tlsproxy/tls -name '_*.c' ! -name _openssl.c)
export UBSAN_OPTIONS=print_stacktrace=1

echo "== leak check"
# shellcheck disable=SC2086
gcc -std=c11 -Wall -Wextra -Wconversion $flags -o "$build/leak_check" tests/asan/leak_check.c $sources -lssl -lcrypto
# The fast unwinder gives up on a fibre's stack, and what has no caller is taken for reachable: leaks would go unseen.
ASAN_OPTIONS=detect_leaks=1:fast_unwind_on_malloc=0 "$build/leak_check"

echo "== unit tests"
mkdir -p "$build/tests/unit"
cp -r pyproject.toml hsm tlsproxy "$build"
cp -r tests/unit/tls "$build/tests/unit"
cp tests/client_cas.py "$build/tests"
find "$build" -name '*.so' -delete
"$python" -m cython -3 "$build/tlsproxy/tls/_openssl.pyx" -o "$build/_openssl.c"
include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
# shellcheck disable=SC2086
gcc -shared -fPIC $flags -I"$include" -Itlsproxy/tls -o "$build/tlsproxy/tls/_openssl$suffix" \
    "$build/_openssl.c" $sources -lssl -lcrypto
cd "$build"
# Python's own allocator would hide overruns of bytes objects. Its leaks at exit are not ours to tell. Fibres have
# stacks of their own, which the fake stack of use-after-return does not know. The quarantine of freed memory is small
# enough to be full before a test measures that memory stays flat.
LD_PRELOAD=$(gcc -print-file-name=libasan.so) PYTHONMALLOC=malloc PYTHONPATH=$build \
    ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0:quarantine_size_mb=8 \
    "$python" -m pytest -q -p no:cacheprovider tests/unit/tls
