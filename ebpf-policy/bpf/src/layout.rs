//! Keys and values of the maps. A change here is a change of [`LAYOUT_VERSION`].
//!
//! Ids are 64-bit hashes of what they stand for (0 is reserved), so an entry under an id never changes its meaning: the agent
//! writes new entries, switches endpoints and addresses over to them one by one, and removes what nothing names any more.

use core::cell::Cell;

/// Version of everything in this file; an agent adopts pinned maps only if it is the same.
pub const LAYOUT_VERSION: u32 = 2;

/// Id of a policy set: all policies that isolate an endpoint in one direction, in order. [`NOT_ISOLATED`] means none does.
pub type SetId = u64;
/// Id of an identity: a class of addresses that every peer selector treats alike. [`WORLD`] matches none.
pub type IdentityId = u64;
/// Id of a port table: protocol and port to decision. [`EMPTY_TABLE`] allows nothing.
pub type TableId = u64;
/// Id of a policy's rule; 0 is none.
pub type RuleId = u64;

/// No policy isolates the endpoint in this direction.
pub const NOT_ISOLATED: SetId = 0;
/// The identity of an address that no peer selector matches.
pub const WORLD: IdentityId = 0;
/// The table without entries.
pub const EMPTY_TABLE: TableId = 0;

/// An IP address as it stands in a packet; IPv4 as an IPv4-mapped IPv6 address (RFC 4291, 2.5.5.2).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Addr(pub [u32; 4]);

impl Addr {
    /// From the bytes of an IPv6 address.
    #[inline(always)]
    pub const fn v6(b: [u8; 16]) -> Self {
        Self([
            u32::from_ne_bytes([b[0], b[1], b[2], b[3]]),
            u32::from_ne_bytes([b[4], b[5], b[6], b[7]]),
            u32::from_ne_bytes([b[8], b[9], b[10], b[11]]),
            u32::from_ne_bytes([b[12], b[13], b[14], b[15]]),
        ])
    }

    /// From the bytes of an IPv4 address.
    #[inline(always)]
    pub const fn v4(b: [u8; 4]) -> Self {
        Self([0, 0, u32::from_ne_bytes([0, 0, 0xff, 0xff]), u32::from_ne_bytes(b)])
    }

    /// The address as 16 bytes in network order.
    pub const fn octets(&self) -> [u8; 16] {
        let (a, b, c, d) = (
            self.0[0].to_ne_bytes(),
            self.0[1].to_ne_bytes(),
            self.0[2].to_ne_bytes(),
            self.0[3].to_ne_bytes(),
        );
        [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]]
    }

    /// fe80::/10 (RFC 4291) or 169.254.0.0/16 (RFC 3927).
    #[inline(always)]
    pub const fn is_link_local(&self) -> bool {
        let first = self.0[0].to_ne_bytes();
        if self.is_v4() {
            let v4 = self.0[3].to_ne_bytes();
            return v4[0] == 169 && v4[1] == 254;
        }
        first[0] == 0xfe && first[1] & 0xc0 == 0x80
    }

    /// Whether this is an IPv4 address.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == u32::from_ne_bytes([0, 0, 0xff, 0xff])
    }
}

/// `CONFIG[0]`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// [`LAYOUT_VERSION`] of whoever made the maps.
    pub layout: u32,
    /// Counts changes of policy; a connection judged under another revision is judged again.
    pub revision: u32,
}

/// `ENDPOINTS[ifindex]`: a pod's host-side veth. An attached device without an entry is closed.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Endpoint {
    /// Policies on traffic to the pod.
    pub ingress: SetId,
    /// Policies on traffic from the pod.
    pub egress: SetId,
    /// Table for sources whose identity the ingress set does not mention.
    pub ingress_table: TableId,
    /// Table for destinations whose identity the egress set does not mention.
    pub egress_table: TableId,
    /// 1 if nothing but ARP and neighbour discovery may pass.
    pub closed: u32,
    /// Zero.
    pub reserved: u32,
}

/// `ADDRESSES[Addr]`: every pod address known.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Address {
    /// Its identity.
    pub identity: IdentityId,
    /// The endpoint that owns it, 0 if that is on another node.
    pub ifindex: u32,
    /// Zero.
    pub reserved: u32,
}

/// Key of `SETS`: what a policy set says about an identity. The value is a [`TableId`]; without an entry the endpoint's own
/// table counts.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SetKey {
    /// The endpoint's policy set.
    pub set: SetId,
    /// Identity of the other end.
    pub identity: IdentityId,
}

/// Data of `TABLES`' longest-prefix-match key: table (64 bits), protocol (8), port in network order (16), 8 unused bits.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableKey {
    /// The table's id, split so that the key needs no padding.
    pub table: [u32; 2],
    /// Protocol, port (high, low), 0.
    pub port: [u8; 4],
}

impl TableKey {
    /// Length of a prefix that names the table only: all protocols.
    pub const ANY_PROTOCOL: u32 = 64;
    /// Length of a prefix that names table and protocol: all ports.
    pub const ANY_PORT: u32 = 72;
    /// Length of a prefix that names one port.
    pub const ONE_PORT: u32 = 88;

    /// The key of one port.
    #[inline(always)]
    pub const fn new(table: TableId, protocol: u8, port: u16) -> Self {
        let port = port.to_be_bytes();
        Self { table: [(table >> 32) as u32, table as u32], port: [protocol, port[0], port[1], 0] }
    }
}

/// A port table's answer.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Decision {
    /// The rule that decides.
    pub rule: RuleId,
    /// 1 to allow, 0 to deny.
    pub allow: u32,
    /// Zero.
    pub reserved: u32,
}

/// Key of `SERVICES`: an address that is no interface's, from which somebody (kube-proxy) sends packets on to another. The value
/// says nothing.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceKey {
    /// The address.
    pub address: Addr,
    /// The one port of it, or 0 for all of them.
    pub port: u16,
    /// The port's protocol, 0 for all ports.
    pub protocol: u8,
    /// Zero.
    pub reserved: u8,
}

/// `RANGES`: sources behind the tunnel device.
pub mod range {
    /// Some remote node's.
    pub const REMOTE: u32 = 1;
    /// Ours.
    pub const OWN: u32 = 2;
}

/// Key of `CONNECTIONS`: a flow as one endpoint sees it, the same for both directions.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ConnKey {
    /// The pod's address.
    pub local: Addr,
    /// The other end's.
    pub remote: Addr,
    /// The pod's veth: a flow allowed at one endpoint is not thereby allowed at another.
    pub ifindex: u32,
    /// The pod's port; for ICMP echo the identifier.
    pub local_port: u16,
    /// The other end's port; for ICMP echo who asked (see `track`).
    pub remote_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub reserved: [u8; 3],
}

/// A tracked connection. Cells, because packets on other CPUs change it as well; a lost update costs a refresh, no verdict.
#[repr(C)]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Connection {
    /// Monotonic time of the last packet, ns, to about a second.
    pub seen: Cell<u64>,
    /// The rule that allowed it, 0 if none had to.
    pub rule: Cell<RuleId>,
    /// [`Config::revision`] at the last judgement.
    pub revision: Cell<u32>,
    /// Bits from [`state`].
    pub state: Cell<u32>,
}

/// Bits of [`Connection::state`].
pub mod state {
    /// Opened towards the pod (else by it).
    pub const TO_POD: u32 = 1;
    /// The other side has answered.
    pub const REPLIED: u32 = 2;
    /// FIN (SCTP: SHUTDOWN) from the opener.
    pub const FIN_OPENER: u32 = 4;
    /// FIN from the other side.
    pub const FIN_OTHER: u32 = 8;
    /// RST or ABORT from either.
    pub const RESET: u32 = 16;
    /// A change of policy ended it: nothing of it passes until it is opened anew or allowed again.
    pub const CUT: u32 = 32;
    /// Opened by the local node, or by the pod to itself through a Service: policy does not stop it.
    pub const LOCAL_NODE: u32 = 64;
    /// Opened to a Service by a pod that is isolated in egress: each packet is judged where its backend is known.
    pub const SERVICE: u32 = 128;
}

/// Key of `FRAGMENTS`: a datagram whose first fragment was allowed. The value is when, monotonic ns; its lowest bit says that
/// the datagram is still to be judged where it leaves.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FragmentKey {
    /// Source address.
    pub source: Addr,
    /// Destination address.
    pub destination: Addr,
    /// The endpoint.
    pub ifindex: u32,
    /// Identification (16 bits in IPv4, 32 in IPv6).
    pub id: u32,
    /// IP protocol number.
    pub protocol: u8,
    /// [`direction`].
    pub direction: u8,
    /// Zero.
    pub reserved: [u8; 2],
}

/// Directions, seen from the pod.
pub mod direction {
    /// To the pod, or out of the tunnel.
    pub const INGRESS: u8 = 0;
    /// From the pod.
    pub const EGRESS: u8 = 1;
    /// From the pod, where the packet leaves the node's stack: tells fragments there from those at the pod's veth.
    pub const EXIT: u8 = 2;
}

/// Values of `skb->tc_index`, by which the program at a pod's veth tells those behind it what is done. Whatever a pod wrote
/// there itself is overwritten; from a pod, a packet without [`tag::JUDGED`] is judged where it leaves.
pub mod tag {
    /// Policy has seen it, or need not.
    pub const JUDGED: u32 = 0x4d01;
    /// To be judged where its destination is final.
    pub const PENDING: u32 = 0x4d02;
}

/// Key of `COUNTERS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CounterKey {
    /// The device.
    pub ifindex: u32,
    /// [`direction`].
    pub direction: u8,
    /// [`Reason`].
    pub reason: u8,
    /// Zero.
    pub reserved: [u8; 2],
}

/// Value of `COUNTERS`, on each CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Packets; a GSO packet counts once.
    pub packets: u64,
    /// Bytes with headers.
    pub bytes: u64,
}

/// A record of `EVENTS`: a packet that was denied.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// Monotonic time, ns.
    pub time: u64,
    /// The policy set that was asked, if one was.
    pub set: SetId,
    /// The rule that decided, if one did.
    pub rule: RuleId,
    /// Identity of the other end.
    pub identity: IdentityId,
    /// Source address.
    pub source: Addr,
    /// Destination address.
    pub destination: Addr,
    /// The device.
    pub ifindex: u32,
    /// Length with headers.
    pub length: u32,
    /// Source port, 0 if the protocol has none.
    pub source_port: u16,
    /// Destination port; for ICMP type and code.
    pub destination_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// [`direction`].
    pub direction: u8,
    /// [`Reason`].
    pub reason: u8,
    /// Zero.
    pub reserved: u8,
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $value:literal $name:literal,)*) => {
        /// Why a packet passed (below 32) or did not.
        #[repr(u8)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Reason {
            $($(#[$doc])* $variant = $value,)*
        }

        impl Reason {
            /// Every reason.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The name in metrics and events.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

reasons! {
    /// A rule allows it.
    Rule = 1 "rule",
    /// No policy isolates the endpoint in this direction.
    NotIsolated = 2 "not_isolated",
    /// Part of a connection that was allowed.
    Established = 3 "established",
    /// An ICMP error about a connection that was allowed.
    Related = 4 "related",
    /// ARP or neighbour discovery.
    Neighbour = 5 "neighbour",
    /// Sent by this node itself.
    LocalNode = 6 "local_node",
    /// From the pod to itself.
    Hairpin = 7 "hairpin",
    /// A later fragment of an allowed datagram.
    Fragment = 8 "fragment",
    /// Out of the tunnel, from a remote node's range.
    Tunnel = 9 "tunnel",
    /// To a Service, and judged where its backend is known.
    Service = 10 "service",

    /// Isolated, and no rule allows it.
    DefaultDeny = 32 "default_deny",
    /// A rule denies it.
    DenyRule = 33 "deny_rule",
    /// Its connection was ended by a change of policy.
    Cut = 34 "cut",
    /// The endpoint is closed: its pod is not known yet, or any more.
    Closed = 35 "closed",
    /// The device has no endpoint entry.
    UnknownEndpoint = 36 "unknown_endpoint",
    /// The source is not one of the pod's addresses.
    Spoofed = 37 "spoofed",
    /// A link-local source beyond neighbour discovery; nothing routes it.
    LinkLocal = 38 "link_local",
    /// The headers are cut short, contradict each other or are too many.
    Malformed = 39 "malformed",
    /// Neither IP nor ARP.
    NotIp = 40 "not_ip",
    /// A later fragment whose first one was not seen.
    OrphanFragment = 41 "orphan_fragment",
    /// Out of the tunnel with a source that no remote node owns.
    TunnelUnknownSource = 42 "tunnel_unknown_source",
    /// Out of the tunnel with a source of ours.
    TunnelOwnSource = 43 "tunnel_own_source",
    /// To a Service, and where it left nothing told which pod had sent it.
    Unattributed = 44 "unattributed",
    /// The host's own "no" to a connection that policy denied: denied is silence.
    Refusal = 45 "refusal",
}

impl Reason {
    /// Whether packets with this reason pass.
    #[inline(always)]
    pub const fn allows(self) -> bool {
        (self as u8) < 32
    }

    /// Whether such a packet is reported as an event: denied, and not mere noise.
    #[inline(always)]
    pub const fn is_reported(self) -> bool {
        !self.allows() && !matches!(self, Self::LinkLocal | Self::Refusal)
    }

    /// The reason with this number.
    pub fn from_u8(value: u8) -> Option<Self> {
        Self::ALL.iter().copied().find(|reason| *reason as u8 == value)
    }
}

#[cfg(feature = "user")]
mod pod {
    use super::*;

    macro_rules! pod {
        ($($type:ty),* $(,)?) => {
            // SAFETY: repr(C) structs of integers without padding (see ebpf-policy/tests/layout.rs); any bytes are a valid value.
            $(unsafe impl aya::Pod for $type {})*
        };
    }
    pod!(
        Addr,
        Config,
        Endpoint,
        Address,
        SetKey,
        TableKey,
        ServiceKey,
        Decision,
        ConnKey,
        FragmentKey,
        CounterKey,
        Count,
        Event
    );
}
