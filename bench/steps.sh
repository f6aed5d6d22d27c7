# Sourced by bench/gpu.sh: steps that do not stop each other.
#
#     step NAME SECONDS COMMAND…   run it under `timeout`; output to $log, a line to $summary
#     skip NAME WHY                only the line
#     pick PATTERN                 lines of the last step's output that match, as headlines
#     finish                       print the summary; false if a step failed
#
# Below a step's line are its headlines: the lines of its output that begin with "headline: "
# (bench/headline.py), or if there are none, the last line. With list=1 nothing runs, and each step's
# name, seconds and command are printed. On a slower machine, `slower` multiplies the seconds.

from=0 # where the last step's output begins in $log
grace=5 # seconds from SIGTERM to SIGKILL
slower=1
list=
failed=0

# note LINE: to the summary, and to the terminal.
note() { printf '%s\n' "$1" | tee -a "$summary"; }

step() {
    local name=$1 seconds=$2 began=$SECONDS status=0 limit took verdict words
    shift 2
    if [[ -n $list ]]; then
        printf '%s\t%s\t%s\n' "$name" "$((seconds + grace))" "${*@Q}"
        return
    fi

    printf '\n==== %s\n+ %s\n' "$name" "$*" >>"$log"
    from=$(wc -c <"$log")
    limit=$((seconds * slower))
    timeout --kill-after="$grace" "$limit" "$@" </dev/null >>"$log" 2>&1 || status=$?
    took=$((SECONDS - began))

    case $status in
        0) verdict=ok ;;
        124) verdict="timed out" ;;
        137) verdict="timed out"; ((took >= limit)) || verdict="killed" ;; # out of memory?
        *) verdict="failed ($status)" ;;
    esac
    note "$(printf '%-22s %-12s %5d s' "$name" "$verdict" "$took")"
    output | sed -n 's/^headline: /    /p' | tee -a "$summary"
    if ((status)) || (($(output | grep -c '^headline: ') == 0)); then
        words=$(output | grep -v '^[[:space:]]*$' | tail -n 1 | cut -c 1-200)
        [[ -z $words ]] || note "    last words: $words"
    fi
    ((status == 0)) || failed=1
}

# output: of the last step.
output() { tail -c +"$((from + 1))" "$log"; }

pick() {
    [[ -z $list ]] || return 0
    output | grep -E "$1" | sed 's/^ */    /' | tee -a "$summary"
}

skip() {
    [[ -z $list ]] || return 0
    note "$(printf '%-22s left out: %s' "$1" "$2")"
}

finish() {
    [[ -z $list ]] || return 0
    printf '\nThe summary again, %s:\n\n' "$summary"
    cat "$summary"
    return "$failed"
}
