//! Connection tracking: keys, states, time-outs.

use crate::layout::{Addr, ConnKey, Connection, direction, state};
use crate::parse::{Packet, protocol};

const SECOND: u64 = 1_000_000_000;

/// A refresh younger than this is not written again, so that a busy flow does not bounce its entry between CPUs.
const REFRESH: u64 = SECOND;

/// How long a datagram's later fragments may follow the first (Linux' `ipfrag_time`).
pub const FRAGMENT_LIFETIME: u64 = 30 * SECOND;

/// For how long what the host answers to a denied connection is kept from the pod.
pub const REFUSAL_LIFETIME: u64 = 2 * SECOND;

/// The flow a packet belongs to.
#[inline(always)]
pub fn key(ifindex: u32, way: u8, packet: &Packet) -> ConnKey {
    let to_pod = way == direction::INGRESS;
    let (local, remote) = ends(to_pod, packet.source, packet.destination);
    let (local_port, remote_port) = if is_icmp(packet.protocol) {
        // Both ends may ask with the same identifier at once, so who asked is part of the key.
        (packet.source_port, u16::from(packet.opens == to_pod))
    } else if to_pod {
        (packet.destination_port, packet.source_port)
    } else {
        (packet.source_port, packet.destination_port)
    };
    ConnKey { local, remote, ifindex, local_port, remote_port, protocol: packet.protocol, reserved: [0; 3] }
}

/// Local and remote address of a packet.
#[inline(always)]
pub fn ends(to_pod: bool, source: Addr, destination: Addr) -> (Addr, Addr) {
    if to_pod { (destination, source) } else { (source, destination) }
}

/// Whether the protocol is ICMP of either family.
#[inline(always)]
pub fn is_icmp(number: u8) -> bool {
    number == protocol::ICMP || number == protocol::ICMPV6
}

/// The port that policy judges when the flow is judged again: that of whoever did not open it.
#[inline(always)]
pub fn judged_port(key: &ConnKey, to_pod: bool) -> u16 {
    match key.protocol {
        protocol::ICMP => 8 << 8,
        protocol::ICMPV6 => 128 << 8,
        _ if to_pod => key.local_port,
        _ => key.remote_port,
    }
}

/// How long a connection in this state lives without a packet, in ns.
#[inline(always)]
fn lifetime(number: u8, bits: u32) -> u64 {
    let replied = bits & state::REPLIED != 0;
    let both = state::FIN_OPENER | state::FIN_OTHER;
    match number {
        protocol::TCP if bits & state::RESET != 0 || bits & both == both => 10 * SECOND,
        protocol::TCP if bits & both != 0 || !replied => 120 * SECOND,
        protocol::TCP => 24 * 3600 * SECOND,
        protocol::SCTP if bits & state::RESET != 0 => 10 * SECOND,
        protocol::SCTP if replied => 600 * SECOND,
        protocol::UDP if replied => 180 * SECOND,
        protocol::ICMP | protocol::ICMPV6 | protocol::UDP | protocol::SCTP => 30 * SECOND,
        _ => 600 * SECOND,
    }
}

impl Connection {
    /// A connection opened now.
    #[inline(always)]
    pub fn new(now: u64, rule: u64, revision: u32, bits: u32) -> Self {
        Self { seen: now.into(), rule: rule.into(), revision: revision.into(), state: bits.into() }
    }

    /// Whether it has been silent for too long.
    #[inline(always)]
    pub fn is_expired(&self, number: u8, now: u64) -> bool {
        now.saturating_sub(self.seen.get()) > lifetime(number, self.state.get())
    }

    /// Whether it was opened towards the pod.
    #[inline(always)]
    pub fn opened_to_pod(&self) -> bool {
        self.state.get() & state::TO_POD != 0
    }

    /// Notes a packet that passed.
    #[inline(always)]
    pub fn note(&self, packet: &Packet, to_pod: bool, now: u64) {
        let bits = self.state.get();
        let from_opener = to_pod == (bits & state::TO_POD != 0);
        let mut new = bits;
        if !from_opener {
            new |= state::REPLIED;
        }
        if packet.finishes {
            new |= if from_opener { state::FIN_OPENER } else { state::FIN_OTHER };
        }
        if packet.resets {
            new |= state::RESET;
        }
        if new != bits {
            self.state.set(new);
        }
        if now.saturating_sub(self.seen.get()) > REFRESH {
            self.seen.set(now);
        }
    }
}
