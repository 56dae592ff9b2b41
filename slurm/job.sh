# ---- from here on the same in every script ---------------------------------------------------------------------------

restarts=${SLURM_RESTART_COUNT:-0} # SLURM leaves it unset at the first start
attempt=0                          # tries within this start
stopping=''                        # when the signal came
stuck=''                           # whether srun had to be killed
unfit=''                           # nodes that failed the preflight
late_s=$((notice_s > 30 ? notice_s - 15 : notice_s / 2)) # after the signal: then it is requeued, saved or not
step_cpus=() # srun does not take them over; without the option a step has all that its job has
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then step_cpus=("--cpus-per-task=$SLURM_CPUS_PER_TASK"); fi
me=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # an array's id alone would mean all of it
me=${me:-$SLURM_JOB_ID}
notes=$job_folder/$stage${SLURM_ARRAY_TASK_ID:+-$SLURM_ARRAY_TASK_ID} # of this element of an array alone
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

say() { printf '%s job %s: %s\n' "$(date -u +%H:%M:%S)" "$me" "$*"; }

free_port() { # on this node, which is the first one: from the job's id, so that jobs on one node do not meet
    local port=$((20000 + (SLURM_JOB_ID * 16 + attempt) % 12000))
    while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
    echo "$port"
}

newest() { # what tells whether a start got on: the newest checkpoint, or how many steps prepare has finished
    if [ "$stage" = prepare ]; then wc -l <"$progress"; else cat "$progress"; fi 2>/dev/null
}

answer() { # of a command of SLURM's; when many jobs are preempted at once the controller is busy
    local number
    for number in 1 2 3 4 5 6; do
        "$@" && return
        if [ "$number" != 6 ]; then sleep 5; fi
    done
    return 1
}

count_start() { # sets fruitless to the starts just before this one after which no newer checkpoint was there
    local id counted checkpoint
    before=$(newest)
    fruitless=0
    if read -r id counted checkpoint 2>/dev/null <"$notes.starts" && [ "$id $checkpoint" = "$SLURM_JOB_ID $before" ]; then
        fruitless=$((counted + 1))
    fi
    echo "$SLURM_JOB_ID $fruitless $before" >"$notes.starts"
}

may_start_again() { [ "$(newest)" != "$before" ] || [ "$fruitless" -lt "${1:-$max_restarts}" ]; }

look_at_nodes() { # sets unfit to the nodes that are not to be used, with a comma between them; excluded to all of these
    local found=$outcome.nodes nodes_here looking known left
    port=$(free_port)
    mapfile -t nodes_here < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    mkdir -p "$found"
    timeout $((preflight_s + container_start_s)) srun --kill-on-bad-exit=0 --nodes="$SLURM_JOB_NUM_NODES" \
        --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 "${srun_options[@]}" "${container[@]}" \
        timeout "$preflight_s" "$python" -m slurm.preflight probe "$found" "$least_gb_s" "$head_node" "$port" \
        "$gpus_per_node" &
    looking=$!
    while kill -0 "$looking" 2>/dev/null; do
        wait "$looking"
        if [ -n "$stopping" ]; then kill "$looking"; return; fi
    done
    unfit=$(srun --nodes=1 --ntasks=1 --nodelist="$head_node" "${srun_options[@]}" "${container[@]}" \
        "$python" -m slurm.preflight judge "$found" "$least_gb_s" "${nodes_here[@]}") || { say "the preflight failed"; exit 71; }
    if [ -z "$unfit" ]; then rm -f "$notes.none_fit"; return; fi
    if [ "$(echo "$unfit" | tr ',' '\n' | grep -c .)" = "${#nodes_here[@]}" ]; then
        if [ -e "$notes.none_fit" ]; then rm -f "$notes.none_fit"; say "again no node is fit: that is not the nodes"; exit 71; fi
        touch "$notes.none_fit"
    fi
    excluded=$(answer scontrol show job --oneliner "$me" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p')
    if [ -z "$excluded" ]; then say "SLURM does not tell which nodes are excluded: $unfit cannot be added"; exit 71; fi
    if [ "$excluded" = '(null)' ]; then excluded=''; fi
    excluded=${excluded:+$excluded,}$unfit
    known=$(answer sinfo --noheader --Node --partition="$partitions" --format=%N | sort -u)
    left=$(echo "$known" | grep -cvxF -f <(scontrol show hostnames "$excluded"))
    if [ -n "$known" ] && [ "$left" -lt "$fewest_nodes" ]; then # it would wait for ever
        say "without $excluded the partition has $left nodes, and this job needs $fewest_nodes"
        exit 71
    fi
}

start_ranks() { # one task a node; what stands in single quotes is expanded there
    nodes=$SLURM_JOB_NUM_NODES
    ranks=$((nodes * ranks_per_node))
    port=$(free_port)
    mkdir -p "$outcome"
    export nodes ranks head_node port outcome python stage recipe launch_config
    say "start $restarts.$attempt: $stage as $ranks ranks on $SLURM_JOB_NODELIST, rendezvous at $head_node:$port"
    # shellcheck disable=SC2016
    srun --kill-on-bad-exit=1 --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 \
        "${step_cpus[@]}" "${srun_options[@]}" "${container[@]}" bash -c '
            trap "" USR1 # the launcher would die of it; the ranks set a handler of their own
            if [ "$ranks" -gt 1 ]; then set -- --multi_gpu --same_network; fi
            exec "$python" -m accelerate.commands.launch --config_file "$launch_config" "$@" \
                --num_machines "$nodes" --num_processes "$ranks" --machine_rank "$SLURM_NODEID" \
                --main_process_ip "$head_node" --main_process_port "$port" --rdzv_backend static \
                --mixed_precision no --dynamo_backend no --num_cpu_threads_per_process "${OMP_NUM_THREADS:-1}" \
                -m slurm.rank "$outcome" "$stage" "$recipe"' &
    step=$!
}

wait_for_ranks() { # until srun ends, or must be ended
    local ended=0 asked=-3 number
    while kill -0 "$step" 2>/dev/null; do
        sleep 1 &
        wait $! # not `sleep 1` alone: a trap runs only when the foreground command is over
        # Sent again and again, as ranks that are still importing ignore it.
        if [ -n "$stopping" ] && [ $((SECONDS - asked)) -ge 3 ]; then
            asked=$SECONDS
            kill -USR1 "$step" 2>/dev/null
        fi
        if [ -n "$stopping" ] && [ $((SECONDS - stopping)) -ge "$late_s" ]; then
            say "the ranks have not ended $late_s s after the signal: what they save now may be lost"
            requeue
        fi
        # SLURM does not always notice that a node lost its tasks; srun would wait for them for ever.
        if compgen -G "$outcome/*" >/dev/null; then ended=$((ended + 1)); fi
        if [ "$ended" = "$straggler_s" ]; then
            say "a rank ended ${straggler_s} s ago and others did not: ending the step"
            for number in $(squeue --noheader --steps --jobs="$me" --format=%i | grep -E '\.[0-9]+$'); do
                scancel --signal=KILL "$number" 2>/dev/null
            done
        fi
        if [ "$ended" = $((straggler_s + 30)) ]; then # it still waits for a node that forgot its task
            stuck=yes
            kill -KILL "$step" 2>/dev/null
        fi
    done
    wait "$step"
    code=$?
}

requeue() {
    if ! may_start_again; then
        say "no newer checkpoint in $((fruitless + 1)) starts; slurm.max_restarts is $max_restarts. Submit to go on"
        exit 75
    fi
    say "requeueing"
    trap '' TERM # of the requeueing: it must not come between the two commands
    answer scontrol requeue "$me" || { say "SLURM does not requeue this job; submit once more to go on"; exit 75; }
    if [ -n "$unfit" ]; then # a job's nodes can be chosen only while it waits
        scontrol update "jobid=$me" "excnodelist=$excluded" && say "excluded: $unfit"
    fi
    sleep 600 & # SLURM ends this script now
    wait $!
    exit 75
}

trap 'stopping=${stopping:-$SECONDS}; date +%s >"$notes.stopping"; say "signal: asking the ranks to save"' USR1

while :; do
    attempt=$((attempt + 1))
    outcome=$job_folder/outcome/$SLURM_JOB_ID.$restarts.$attempt
    count_start
    if [ -n "$preflight_s" ]; then
        look_at_nodes
        if [ -n "$unfit" ] || [ -n "$stopping" ]; then requeue; fi
    fi
    start_ranks
    wait_for_ranks
    if [ -n "$stopping" ]; then
        took_s=$((SECONDS - stopping))
        echo "$took_s" >"$notes.last_stop_s"
        say "the ranks ended $took_s s after the signal; the notice is $notice_s s"
    fi
    rm -f "$notes.stopping"
    codes=" $(sort -u "$outcome"/* 2>/dev/null | tr '\n' ' ')"
    say "srun ended with $code, ranks with:$codes"
    for final in 1 2 130; do # a gate, a mistake in the recipe: the next start would end alike
        case $codes in *" $final "*) exit "$final" ;; esac
    done
    # An exception is an error in a program, or a GPU or a network that failed in words of its own; a full disk may be a
    # node's own: tried again twice.
    case $codes in *" 70 "* | *" 74 "*) may_start_again $((max_restarts < 2 ? max_restarts : 2)) || exit 70 ;; esac
    case $codes in *" 75 "* | *" 69 "*) requeue ;; esac
    if [ "$code" = 0 ] && [ "$codes" = " 0 " ]; then exit 0; fi
    # What is left: ranks were killed, lost, or hung.
    if [ -n "$stopping$stuck" ]; then requeue; fi # what is stuck keeps its place in the allocation
    if ! may_start_again; then
        say "a rank was lost, and no newer checkpoint in $((fruitless + 1)) starts; slurm.max_restarts is $max_restarts"
        exit 71
    fi
    say "a rank was lost: starting again from the last checkpoint"
done
