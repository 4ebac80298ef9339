//! What the programs report: denied packets, one by one, and counters.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, SystemTime};

use aya::maps::{MapData, RingBuf};
use margay_bpf::layout::{self, Reason, direction};
use nix::time::{ClockId, clock_gettime};

use crate::compile::{Compiled, ip};
use crate::model::{Direction, PodRef, RuleName};

/// A packet that was denied.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Event {
    /// When.
    pub time: SystemTime,
    /// Device of the endpoint that judged.
    pub ifindex: u32,
    /// The pod behind it, if known.
    pub pod: Option<PodRef>,
    /// Direction seen from that pod.
    pub direction: Direction,
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// Source port, or 0.
    pub source_port: u16,
    /// Destination port, or 0; for ICMP type × 256 + code.
    pub destination_port: u16,
    /// Short name of the reason, as in metrics, e.g. `default_deny`.
    pub reason: &'static str,
    /// The policies (`namespace/name`) that isolate the endpoint in this direction and do not allow the packet.
    pub policies: Vec<String>,
    /// The rule that decided, if one did.
    pub rule: Option<RuleName>,
}

/// Packets and bytes of one endpoint, direction and reason, summed over CPUs.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Counter {
    /// Device of the endpoint.
    pub ifindex: u32,
    /// The pod behind it, if known.
    pub pod: Option<PodRef>,
    /// Direction seen from the pod; ingress at the tunnel device.
    pub direction: Direction,
    /// Whether these packets passed.
    pub allowed: bool,
    /// Short name of the reason.
    pub reason: &'static str,
    /// Packets.
    pub packets: u64,
    /// Bytes, headers included.
    pub bytes: u64,
}

/// The stream of denied packets; its descriptor becomes readable when there are some.
pub struct Events {
    pub(crate) buffer: RingBuf<MapData>,
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events").field("fd", &self.as_raw_fd()).finish()
    }
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.buffer.as_raw_fd()
    }
}

impl Events {
    /// The next event, if there is one; never blocks. `names` is what was applied last: ids from before it stay unnamed.
    pub fn next_event(&mut self, names: &Compiled) -> Option<Event> {
        loop {
            let record = self.buffer.next()?;
            if let Some(event) = decode(&record, names) {
                return Some(event);
            }
        }
    }
}

fn decode(record: &[u8], names: &Compiled) -> Option<Event> {
    let raw = read_event(record)?;
    Some(Event {
        time: wall_clock(raw.time),
        ifindex: raw.ifindex,
        pod: names.names.pods.get(&raw.ifindex).cloned(),
        direction: seen_from_pod(raw.direction),
        source: ip(raw.source),
        destination: ip(raw.destination),
        protocol: raw.protocol,
        source_port: raw.source_port,
        destination_port: raw.destination_port,
        reason: Reason::from_u8(raw.reason).map_or("unknown", Reason::name),
        policies: names.names.sets.get(&raw.set).cloned().unwrap_or_default(),
        rule: names.names.rules.get(&raw.rule).cloned(),
    })
}

#[allow(unsafe_code, reason = "a record is a repr(C) struct that the kernel wrote")]
fn read_event(record: &[u8]) -> Option<layout::Event> {
    if record.len() < size_of::<layout::Event>() {
        return None;
    }
    // SAFETY: long enough, and any bytes are a valid Event (integers only, no padding).
    Some(unsafe { record.as_ptr().cast::<layout::Event>().read_unaligned() })
}

pub(crate) fn seen_from_pod(value: u8) -> Direction {
    if value == direction::EGRESS { Direction::Egress } else { Direction::Ingress }
}

/// From the kernel's monotonic clock to the calendar.
fn wall_clock(monotonic: u64) -> SystemTime {
    #[expect(
        clippy::disallowed_methods,
        reason = "the kernel stamps events with a clock that has no calendar"
    )]
    let now = SystemTime::now();
    let elapsed = clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(Duration::ZERO, |now| Duration::from(now).saturating_sub(Duration::from_nanos(monotonic)));
    now - elapsed
}
