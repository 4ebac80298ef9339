//! The one verdict function.
//!
//! A packet of a live connection costs its parsing and one look-up. A new one costs four more look-ups (endpoint, address,
//! set, table) however many rules, policies and pods there are.

use core::ops::Deref;

use crate::layout::{
    Addr, Address, ConnKey, Connection, Decision, EMPTY_TABLE, Endpoint, FragmentKey, IdentityId,
    NOT_ISOLATED, Reason, RuleId, SetId, SetKey, TableId, TableKey, WORLD, direction, range, state,
};
use crate::parse::{self, Bytes, Kind, Packet, Start};
use crate::track;

/// What was compiled, as the verdict sees it.
pub trait Policy {
    /// The endpoint at a device.
    fn endpoint(&self, ifindex: u32) -> Option<&Endpoint>;
    /// A pod's address.
    fn address(&self, address: &Addr) -> Option<&Address>;
    /// Identity of the longest prefix around an address.
    fn prefix(&self, address: &Addr) -> Option<IdentityId>;
    /// What a set says about an identity.
    fn table(&self, key: &SetKey) -> Option<TableId>;
    /// The longest match in a port table.
    fn decision(&self, key: &TableKey) -> Option<&Decision>;
    /// Whose range a source behind the tunnel is in: one of [`range`].
    fn range(&self, address: &Addr) -> Option<u32>;
}

/// All maps, and the clock.
pub trait Maps {
    /// What was compiled.
    type Policy: Policy;
    /// A connection that may be changed in place.
    type Conn: Deref<Target = Connection>;

    /// What was compiled.
    fn policy(&self) -> &Self::Policy;
    /// Monotonic time, ns.
    fn now(&self) -> u64;
    /// The policy's present revision.
    fn revision(&self) -> u32;
    /// A tracked connection.
    fn connection(&self, key: &ConnKey) -> Option<Self::Conn>;
    /// Tracks a connection.
    fn track(&self, key: &ConnKey, connection: &Connection);
    /// When the first fragment of a datagram was allowed.
    fn fragment(&self, key: &FragmentKey) -> Option<u64>;
    /// Notes that the first fragment of a datagram was allowed.
    fn note_fragment(&self, key: &FragmentKey, now: u64);
}

/// Where a packet is judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hook {
    /// The pod's host-side veth.
    pub ifindex: u32,
    /// [`direction`], seen from the pod.
    pub direction: u8,
    /// The device the packet came in through; 0 if the node itself sent it. Addresses would not tell, since masqueraded and
    /// spoofed packets carry the node's address as well.
    pub input: u32,
}

/// The verdict on a packet, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Allows or denies.
    pub reason: Reason,
    /// The policy set that was asked.
    pub set: SetId,
    /// The rule that decided.
    pub rule: RuleId,
    /// Identity of the other end, if it was looked up.
    pub identity: IdentityId,
}

impl Verdict {
    #[inline(always)]
    const fn plain(reason: Reason) -> Self {
        Self { reason, set: NOT_ISOLATED, rule: 0, identity: WORLD }
    }
}

/// Judges a packet out of the tunnel device: its source must be in some remote node's ranges, and never ours. Which node's,
/// the device itself checks.
#[inline(always)]
pub fn judge_tunnel<M: Maps, B: Bytes>(maps: &M, bytes: B, packet: &mut Packet) -> Verdict {
    if let Err(reason) = parse::addresses(bytes, packet) {
        return Verdict::plain(reason);
    }
    Verdict::plain(match maps.policy().range(&packet.source) {
        Some(range::REMOTE) => Reason::Tunnel,
        Some(range::OWN) => Reason::TunnelOwnSource,
        _ => Reason::TunnelUnknownSource,
    })
}

/// Judges a packet to or from a pod. `packet` is filled in for whoever reports the verdict.
#[inline(always)]
pub fn judge_pod<M: Maps, B: Bytes>(
    maps: &M,
    bytes: B,
    start: Start,
    hook: Hook,
    packet: &mut Packet,
) -> Verdict {
    if let Err(reason) = parse::packet(bytes, start, packet) {
        return Verdict::plain(reason);
    }
    if packet.kind == Kind::Neighbour {
        return Verdict::plain(Reason::Neighbour);
    }
    let to_pod = hook.direction == direction::INGRESS;
    // Before everything else: what is changed later must not be stamped as judged under the change.
    let revision = maps.revision();
    let now = maps.now();
    let key = track::key(hook.ifindex, hook.direction, packet);

    if packet.kind == Kind::Flow
        && !packet.opens
        && let Some(connection) = maps.connection(&key)
        && connection.revision.get() == revision
        && connection.state.get() & state::CUT == 0
        && !connection.is_expired(packet.protocol, now)
    {
        connection.note(packet, to_pod, now);
        let verdict = Verdict { rule: connection.rule.get(), ..Verdict::plain(Reason::Established) };
        if packet.first_fragment {
            maps.note_fragment(&fragment_key(&hook, packet), now);
        }
        return verdict;
    }
    let verdict = judge_slowly(maps, bytes, &hook, packet, &key, revision, now);
    if packet.first_fragment && verdict.reason.allows() {
        maps.note_fragment(&fragment_key(&hook, packet), now);
    }
    verdict
}

/// Everything but a packet of a connection that was judged under the present policy.
#[inline(always)]
fn judge_slowly<M: Maps, B: Bytes>(
    maps: &M,
    bytes: B,
    hook: &Hook,
    packet: &Packet,
    key: &ConnKey,
    revision: u32,
    now: u64,
) -> Verdict {
    let to_pod = hook.direction == direction::INGRESS;
    let Some(endpoint) = maps.policy().endpoint(hook.ifindex) else {
        return Verdict::plain(Reason::UnknownEndpoint);
    };
    if endpoint.closed != 0 {
        return Verdict::plain(Reason::Closed);
    }
    let own = maps.policy().address(&key.local).is_some_and(|address| address.ifindex == hook.ifindex);
    if !to_pod && !own {
        return Verdict::plain(if key.local.is_link_local() { Reason::LinkLocal } else { Reason::Spoofed });
    }
    // From the pod to itself; by way of a Service it comes back through the very device it left by.
    if if to_pod { hook.input == hook.ifindex } else { packet.source == packet.destination } {
        return Verdict::plain(Reason::Hairpin);
    }
    if packet.kind == Kind::LaterFragment {
        let first = maps.fragment(&fragment_key(hook, packet));
        return Verdict::plain(match first {
            Some(seen) if now.saturating_sub(seen) <= track::FRAGMENT_LIFETIME => Reason::Fragment,
            _ => Reason::OrphanFragment,
        });
    }
    if packet.kind == Kind::IcmpError && is_related(maps, bytes, hook, packet, endpoint, revision, now) {
        return Verdict::plain(Reason::Related);
    }
    if packet.kind == Kind::Flow
        && !packet.opens
        && let Some(connection) = maps.connection(key)
        && !connection.is_expired(key.protocol, now)
    {
        let opener = connection.opened_to_pod();
        if is_live(maps, endpoint, key, &connection, revision) {
            connection.note(packet, to_pod, now);
            return Verdict { rule: connection.rule.get(), ..Verdict::plain(Reason::Established) };
        }
        // What the opener sends is judged below as if new, for the sake of its reason. The other side must not be able
        // to keep a connection alive that policy has ended, not even where it might open one of its own.
        if opener != to_pod {
            let set = if opener { endpoint.ingress } else { endpoint.egress };
            return Verdict { set, ..Verdict::plain(Reason::Cut) };
        }
    }
    let mut bits = if to_pod { state::TO_POD } else { 0 };
    let verdict = if to_pod && hook.input == 0 {
        bits |= state::LOCAL_NODE;
        Verdict::plain(Reason::LocalNode)
    } else {
        judge_new(maps.policy(), endpoint, to_pod, &key.remote, packet.protocol, packet.destination_port)
    };
    // An echo reply without a request opens nothing, and a flow to an address that is not the pod's is none of its flows.
    let opens = packet.kind == Kind::Flow && (packet.opens || !track::is_icmp(packet.protocol));
    if verdict.reason.allows() && opens && own {
        maps.track(key, &Connection::new(now, verdict.rule, revision, bits));
    }
    verdict
}

/// Policy itself: may this endpoint have a connection with that address and port?
#[inline(always)]
pub fn judge_new<P: Policy>(
    policy: &P,
    endpoint: &Endpoint,
    to_pod: bool,
    remote: &Addr,
    protocol: u8,
    port: u16,
) -> Verdict {
    let (set, default) = if to_pod {
        (endpoint.ingress, endpoint.ingress_table)
    } else {
        (endpoint.egress, endpoint.egress_table)
    };
    if set == NOT_ISOLATED {
        return Verdict::plain(Reason::NotIsolated);
    }
    let identity = match policy.address(remote) {
        Some(address) => address.identity,
        None => policy.prefix(remote).unwrap_or(WORLD),
    };
    let table = policy.table(&SetKey { set, identity }).unwrap_or(default);
    let denied = Verdict { reason: Reason::DefaultDeny, set, rule: 0, identity };
    if table == EMPTY_TABLE {
        return denied;
    }
    match policy.decision(&TableKey::new(table, protocol, port)) {
        Some(decision) if decision.allow == 1 => {
            Verdict { reason: Reason::Rule, rule: decision.rule, ..denied }
        }
        Some(decision) => Verdict { reason: Reason::DenyRule, rule: decision.rule, ..denied },
        None => denied,
    }
}

/// Whether a known connection may go on: judged again, the way it was opened, if policy has changed since.
#[inline(always)]
fn is_live<M: Maps>(
    maps: &M,
    endpoint: &Endpoint,
    key: &ConnKey,
    connection: &Connection,
    revision: u32,
) -> bool {
    let bits = connection.state.get();
    if connection.revision.get() == revision {
        return bits & state::CUT == 0;
    }
    let opened_to_pod = bits & state::TO_POD != 0;
    let port = track::judged_port(key, opened_to_pod);
    let verdict = if bits & state::LOCAL_NODE != 0 {
        Verdict::plain(Reason::LocalNode)
    } else {
        judge_new(maps.policy(), endpoint, opened_to_pod, &key.remote, key.protocol, port)
    };
    let live = verdict.reason.allows();
    connection.state.set(if live { bits & !state::CUT } else { bits | state::CUT });
    connection.rule.set(verdict.rule);
    connection.revision.set(revision);
    live
}

/// Whether an ICMP error is about a live connection of this endpoint. Any router may send it; the packet it quotes must have
/// travelled the other way.
#[inline(always)]
fn is_related<M: Maps, B: Bytes>(
    maps: &M,
    bytes: B,
    hook: &Hook,
    error: &Packet,
    endpoint: &Endpoint,
    revision: u32,
    now: u64,
) -> bool {
    let mut inner = Packet::default();
    if parse::quoted(bytes, error.inner, &mut inner).is_err() || inner.kind != Kind::Flow {
        return false;
    }
    if inner.source != error.destination {
        return false;
    }
    let other_way = if hook.direction == direction::INGRESS { direction::EGRESS } else { direction::INGRESS };
    let key = track::key(hook.ifindex, other_way, &inner);
    match maps.connection(&key) {
        Some(connection) => {
            !connection.is_expired(key.protocol, now) && is_live(maps, endpoint, &key, &connection, revision)
        }
        None => false,
    }
}

#[inline(always)]
fn fragment_key(hook: &Hook, packet: &Packet) -> FragmentKey {
    FragmentKey {
        source: packet.source,
        destination: packet.destination,
        ifindex: hook.ifindex,
        id: packet.fragment_id,
        protocol: packet.protocol,
        direction: hook.direction,
        reserved: [0; 2],
    }
}
