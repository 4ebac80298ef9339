//! `meshctl events`.

use mesh_api::status::DenyEvent;

use super::{table as new_table, text};

const HEADER: [&str; 8] =
    ["TIME", "ENDPOINT", "DIRECTION", "PROTOCOL", "SOURCE", "DESTINATION", "REASON", "POLICIES"];

pub(crate) fn table(events: &[DenyEvent]) -> String {
    if events.is_empty() {
        return "nothing dropped".to_owned();
    }
    let mut out = new_table(&HEADER);
    for event in events {
        out.add_row(row(event));
    }
    text(&out)
}

/// Rows without a header, for `--follow`.
pub(crate) fn lines(events: &[DenyEvent]) -> String {
    events.iter().map(|event| row(event).join("  ")).collect::<Vec<_>>().join("\n")
}

/// What `newer` has behind the last event of `older`; all of it when that one has left the buffer.
pub(crate) fn after(older: &[DenyEvent], newer: &[DenyEvent]) -> Vec<DenyEvent> {
    let seen = older.last().and_then(|last| newer.iter().rposition(|event| event == last));
    newer.iter().skip(seen.map_or(0, |position| position + 1)).cloned().collect()
}

fn row(event: &DenyEvent) -> Vec<String> {
    let end = |address: std::net::IpAddr, port: u16| match port {
        0 => address.to_string(),
        _ => std::net::SocketAddr::new(address, port).to_string(),
    };
    vec![
        clock(event.time_ms),
        event.endpoint.clone(),
        event.direction.clone(),
        event.protocol.clone(),
        end(event.src, event.src_port),
        end(event.dst, event.dst_port),
        event.reason.clone(),
        if event.policies.is_empty() { "-".to_owned() } else { event.policies.join(",") },
    ]
}

/// Time of day, UTC.
fn clock(unix_ms: u64) -> String {
    let (seconds, millis) = (unix_ms / 1000 % 86_400, unix_ms % 1000);
    format!("{:02}:{:02}:{:02}.{millis:03}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(time_ms: u64) -> DenyEvent {
        DenyEvent {
            time_ms,
            endpoint: "x/a".to_owned(),
            direction: "ingress".to_owned(),
            src: "10.0.0.1".parse().unwrap(),
            dst: "fd00::2".parse().unwrap(),
            protocol: "TCP".to_owned(),
            src_port: 0,
            dst_port: 80,
            reason: "DefaultDeny".to_owned(),
            policies: vec!["x/deny".to_owned()],
        }
    }

    #[test]
    fn an_event_names_both_ends_and_the_policy() {
        assert_eq!(
            lines(&[event(3_723_004)]),
            "01:02:03.004  x/a  ingress  TCP  10.0.0.1  [fd00::2]:80  DefaultDeny  x/deny"
        );
    }

    #[test]
    fn follow_prints_only_what_is_new() {
        let (first, second, third) = (event(1), event(2), event(3));
        let older = [first.clone(), second.clone()];
        assert_eq!(after(&older, &[second, third.clone()]), std::slice::from_ref(&third));
        assert_eq!(after(&older, &older), []);
        assert_eq!(after(&[], &older), older);
        assert_eq!(after(&[first], std::slice::from_ref(&third)), [third]);
    }
}
