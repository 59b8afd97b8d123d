#!/bin/sh
# A child in the shell, with nothing but sed: what it does with a turn are the words of its payload.

field() { printf '%s\n' "$1" | sed -n "s/.*\"$2\":\"\([^\"]*\)\".*/\1/p"; }
reply() { printf '{"type":"reply","message_ids":[%s],"body":{"text":"%s"}}\n' "$1" "$2"; }

witness= taking=
printf '{"type":"ready","protocol":%s}\n' "${1:-1}"

work() {
    said=0
    for word in $2; do
        case $word in
            delta) said=$((said + 1)); printf '{"type":"event","message_id":"%s","kind":"delta","body":%s}\n' "$1" "$said" ;;
            reply) reply "\"$1\"" done ;;
            slow) sleep 0.3; reply "\"$1\"" slow ;;
            withhold) printf '{"type":"withhold","code":"provider_overloaded"}\n' ;;
            take) taking=$1 ;;
            crash) exit 3 ;;
        esac
    done
}

while IFS= read -r line; do
    id=$(field "$line" message_id)
    case $line in
        '{"type":"turn"'*)
            witness=${witness:-$id}
            work "$id" "$(field "$line" payload)" ;;
        '{"type":"drain"'* | '{"type":"stop"'*)
            # One thing after the other: what came before has been answered, or is held and left.
            exit 0 ;;
        *)
            type=$(printf '%s\n' "$line" | sed 's/^{"type":"\([a-z]*\)".*/\1/')
            if [ "$type" = input ] && [ -n "$taking" ]; then reply "\"$taking\",\"$id\"" both; fi
            about=$(field "$line" request_id)
            about=${about:-$id}
            printf '{"type":"event","message_id":"%s","kind":"heard","body":{"line":"%s","about":%s}}\n' \
                "$witness" "$type" "${about:+\"}${about:-null}${about:+\"}" ;;
    esac
done
