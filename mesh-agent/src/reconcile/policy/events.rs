//! Denied packets, told: kept for `/v1/events`, and logged at a bounded rate.

#![allow(unsafe_code)] // tokio cannot know that a ring buffer's descriptor stays open.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, UNIX_EPOCH};

use ebpf_policy::{Event, Events};
use mesh_api::status::DenyEvent;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio_util::sync::CancellationToken;

use super::Engine;

/// Events kept.
const KEPT: usize = 1024;
/// Lines logged in a second; the rest is counted.
const LOGGED_PER_SECOND: u32 = 10;
/// Look even when nothing woke us: the kernel wakes readers only of an empty buffer.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// The last denied packets, newest last. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct DenyLog(Arc<Mutex<VecDeque<DenyEvent>>>);

impl DenyLog {
    /// Adds one, at the cost of the oldest.
    pub fn push(&self, event: DenyEvent) {
        let mut events = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if events.len() == KEPT {
            events.pop_front();
        }
        events.push_back(event);
    }

    /// All of them.
    pub fn list(&self) -> Vec<DenyEvent> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}

/// Reads events until cancelled.
pub async fn follow(engine: Arc<Engine>, log: DenyLog, cancel: CancellationToken) {
    if let Some(Err(error)) = cancel.run_until_cancelled(read(&engine, &log)).await {
        tracing::error!("denied packets are not told: {error}");
    }
}

async fn read(engine: &Engine, log: &DenyLog) -> io::Result<()> {
    let events = engine.events().await.map_err(io::Error::other)?;
    // SAFETY: the descriptor is the ring buffer's own, open for as long as `Events` lives.
    let mut reader = unsafe { AsyncFd::register_with_interest(events, Interest::READABLE)? };
    let mut rate = Rate::default();
    let mut drain = |events: &mut Events| {
        let names = engine.applied();
        while let Some(event) = events.next_event(&names) {
            let event = describe(event);
            if let Some(suppressed) = rate.admit(Instant::now()) {
                tell(&event, suppressed);
            }
            log.push(event);
        }
    };
    loop {
        match tokio::time::timeout(LOOK_AGAIN, reader.readable_mut()).await {
            Ok(ready) => {
                let mut ready = ready?;
                drain(ready.get_inner_mut());
                ready.clear_ready();
            }
            Err(_) => drain(reader.get_mut()),
        }
    }
}

fn tell(event: &DenyEvent, suppressed: u64) {
    let DenyEvent { endpoint, direction, src, dst, protocol, src_port, dst_port, reason, policies, .. } =
        event;
    let policies = policies.join(",");
    tracing::info!(endpoint, direction, %src, src_port, %dst, dst_port, protocol, reason, policies, suppressed, "denied");
}

/// Lets a number of lines a second through and counts the others.
#[derive(Debug, Default)]
struct Rate {
    second: Option<Instant>,
    told: u32,
    suppressed: u64,
}

impl Rate {
    /// `None` to keep quiet, else how many were kept quiet about since the last line.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        if self.second.is_none_or(|start| now.saturating_duration_since(start) >= Duration::from_secs(1)) {
            self.second = Some(now);
            self.told = 0;
        }
        if self.told == LOGGED_PER_SECOND {
            self.suppressed += 1;
            return None;
        }
        self.told += 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

/// In the API's words.
fn describe(event: Event) -> DenyEvent {
    let endpoint = match &event.pod {
        Some(pod) => pod.to_string(),
        None => nix::net::if_::if_indextoname(event.ifindex)
            .ok()
            .and_then(|name| name.into_string().ok())
            .unwrap_or_else(|| format!("interface {}", event.ifindex)),
    };
    let since = event.time.duration_since(UNIX_EPOCH).unwrap_or_default();
    DenyEvent {
        time_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
        endpoint,
        direction: event.direction.to_string(),
        src: event.source,
        dst: event.destination,
        protocol: protocol(event.protocol),
        src_port: event.source_port,
        dst_port: event.destination_port,
        reason: camel_case(event.reason),
        policies: event.policies,
    }
}

/// By IANA's protocol numbers.
fn protocol(number: u8) -> String {
    match number {
        1 | 58 => "ICMP".to_owned(),
        6 => "TCP".to_owned(),
        17 => "UDP".to_owned(),
        132 => "SCTP".to_owned(),
        other => other.to_string(),
    }
}

/// `default_deny` to `DefaultDeny`.
fn camel_case(snake: &str) -> String {
    let capital = |word: &str| {
        let mut letters = word.chars();
        letters
            .next()
            .map(|first| first.to_ascii_uppercase().to_string() + letters.as_str())
            .unwrap_or_default()
    };
    snake.split('_').map(capital).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn words_are_in_camel_case() {
        assert_eq!(camel_case("default_deny"), "DefaultDeny");
        assert_eq!(camel_case("closed"), "Closed");
        assert_eq!(camel_case(""), "");
    }

    #[test]
    fn a_flood_is_logged_in_part_and_counted_in_full() {
        let mut rate = Rate::default();
        let start = Instant::now();
        let told = (0..1000).filter(|_| rate.admit(start).is_some()).count();
        assert_eq!(told, LOGGED_PER_SECOND as usize);
        assert_eq!(rate.admit(start + Duration::from_secs(1)), Some(990));
        assert_eq!(rate.admit(start + Duration::from_secs(1)), Some(0));
    }

    #[test]
    fn the_log_keeps_the_newest() {
        let log = DenyLog::default();
        for time_ms in 0..2000 {
            log.push(DenyEvent {
                time_ms,
                endpoint: "default/a".into(),
                direction: "ingress".into(),
                src: "10.0.0.1".parse().unwrap(),
                dst: "10.0.0.2".parse().unwrap(),
                protocol: protocol(6),
                src_port: 1,
                dst_port: 2,
                reason: "DefaultDeny".into(),
                policies: Vec::new(),
            });
        }
        let kept = log.list();
        assert_eq!((kept.len(), kept[0].time_ms, kept[1023].time_ms), (1024, 976, 1999));
    }
}
