python3 -m pip install -q --no-deps --no-build-isolation -e . 2>/dev/null || { ln -s ../models jaxllm/models; export PYTHONPATH=$PWD; }
export PYTHONUNBUFFERED=1 JAXLLM_CACHE_DIR=/tmp/jc
P() { n=$1; shift; XLA_PYTHON_CLIENT_PREALLOCATE=false JAXLLM_TEST_GPU=1 timeout 78 python3 -m pytest -v -m gpu -p no:cacheprovider "$@" > $OUT/$n.txt 2>&1; }
D=tests/pallas_kernels/test_paged_decode_mosaic.py; R=tests/pallas_kernels/test_ragged_prefill_mosaic.py; Q=tests/pallas_kernels/test_quant_matmul_mosaic.py
P d1 $D -k "ctx2k and int8 or window" & P d2 $D -k "fp8 or queries or mpt" & P d3 $D -k "phi3 or phi2 or glm4 or llama2" &
P r1 $R -k "window or tiles or kinds" & P r2 $R -k "cap or ALiBi or once" & P r3 $R -k "int8 or fp8" & P r4 $R -k "narrow or wide or 80 or jobs or eight or no_rows" &
P q1 $Q -k "fp8 x fp8 b64 or int8 x int8 b64 or zeros or g32 or down" &
wait
grep -hE "PASSED|FAILED|ERROR" $OUT/*.txt | sed 's/.*:://' | awk '{print $NF, $0}' | cut -c1-110 | sort | uniq -c | awk '{print $2}' | sort | uniq -c
grep -hE "FAILED|ERROR" $OUT/*.txt | cut -c1-140 | head -20
tail -qn 1 $OUT/*.txt | cut -c1-120
cd scripts
timeout 62 python3 benchmark_loading.py --repeats 2 --out $OUT/loading.json > $OUT/loading.log 2>&1; tail -n 1 $OUT/loading.log | cut -c1-300
timeout 95 python3 benchmark_end_to_end.py llama-3.1-8b --max-num-seqs 256 --max-num-batched-tokens 8192 --output-json $OUT/e8.json > $OUT/e8.log 2>&1; tail -n 5 $OUT/e8.log | cut -c1-200
