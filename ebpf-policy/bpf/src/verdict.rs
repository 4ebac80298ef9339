//! The one verdict function.
//!
//! A packet of a live connection costs its parsing and one look-up. A new one costs four more look-ups (endpoint, address,
//! set, table) however many rules, policies and pods there are.

use core::ops::Deref;

use crate::layout::{
    Addr, Address, ConnKey, Connection, Decision, EMPTY_TABLE, Endpoint, FragmentKey, IdentityId,
    NOT_ISOLATED, Reason, RuleId, ServiceKey, SetId, SetKey, TableId, TableKey, WORLD, direction, range,
    state,
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
    /// Whether packets to it go on to another address.
    fn is_service(&self, key: &ServiceKey) -> bool;
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
    /// Goes to a Service: it passes here and is judged again where its destination is final.
    pub pending: bool,
}

impl Verdict {
    #[inline(always)]
    const fn plain(reason: Reason) -> Self {
        Self { reason, set: NOT_ISOLATED, rule: 0, identity: WORLD, pending: false }
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
    if to_pod && hook.input == 0 && is_refusal(maps, bytes, &hook, packet, now) {
        return Verdict::plain(Reason::Refusal);
    }

    if packet.kind == Kind::Flow
        && !packet.opens
        && let Some(connection) = maps.connection(&key)
        && connection.revision.get() == revision
        && connection.state.get() & state::CUT == 0
        && !connection.is_expired(packet.protocol, now)
    {
        connection.note(packet, to_pod, now);
        let verdict = established(&connection, to_pod);
        if packet.first_fragment {
            note_fragment(maps, &fragment_key(hook.ifindex, hook.direction, packet), now, &verdict);
        }
        return verdict;
    }
    let verdict = judge_slowly(maps, bytes, &hook, packet, &key, revision, now);
    if packet.first_fragment && verdict.reason.allows() {
        note_fragment(maps, &fragment_key(hook.ifindex, hook.direction, packet), now, &verdict);
    }
    verdict
}

#[inline(always)]
fn established(connection: &Connection, to_pod: bool) -> Verdict {
    let pending = !to_pod && connection.state.get() & state::SERVICE != 0;
    Verdict { rule: connection.rule.get(), pending, ..Verdict::plain(Reason::Established) }
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
    // From the pod to itself; by way of a Service it comes back through the very device it left by, and its answers go to
    // whatever address stands in for the pod's own.
    if to_pod && hook.input == hook.ifindex {
        if packet.kind == Kind::Flow && own {
            let bits = state::TO_POD | state::LOCAL_NODE;
            maps.track(key, &Connection::new(now, 0, revision, bits));
        }
        return Verdict::plain(Reason::Hairpin);
    }
    if !to_pod && packet.source == packet.destination {
        return Verdict::plain(Reason::Hairpin);
    }
    if packet.kind == Kind::LaterFragment {
        return of_first_fragment(maps, &fragment_key(hook.ifindex, hook.direction, packet), now);
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
            return established(&connection, to_pod);
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
        judge_opening(maps.policy(), endpoint, to_pod, &key.remote, packet.protocol, packet.destination_port)
    };
    if verdict.pending {
        bits |= state::SERVICE;
    }
    // An echo reply without a request opens nothing, and a flow to an address that is not the pod's is none of its flows.
    let opens = packet.kind == Kind::Flow && (packet.opens || !track::is_icmp(packet.protocol));
    if verdict.reason.allows() && opens && own {
        maps.track(key, &Connection::new(now, verdict.rule, revision, bits));
    }
    verdict
}

/// Policy on a connection's first packet at the pod's own device. What goes to a Service has not got its final destination there.
#[inline(always)]
fn judge_opening<P: Policy>(
    policy: &P,
    endpoint: &Endpoint,
    to_pod: bool,
    remote: &Addr,
    protocol: u8,
    port: u16,
) -> Verdict {
    if !to_pod && endpoint.egress != NOT_ISOLATED && is_service(policy, remote, protocol, port) {
        return Verdict { set: endpoint.egress, pending: true, ..Verdict::plain(Reason::Service) };
    }
    judge_new(policy, endpoint, to_pod, remote, protocol, port)
}

#[inline(always)]
fn is_service<P: Policy>(policy: &P, address: &Addr, protocol: u8, port: u16) -> bool {
    if !matches!(protocol, parse::protocol::TCP | parse::protocol::UDP | parse::protocol::SCTP) {
        return false;
    }
    let whole = ServiceKey { address: *address, ..ServiceKey::default() };
    policy.is_service(&whole) || policy.is_service(&ServiceKey { port, protocol, ..whole })
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
    let denied = Verdict { set, identity, ..Verdict::plain(Reason::DefaultDeny) };
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
        judge_opening(maps.policy(), endpoint, opened_to_pod, &key.remote, key.protocol, port)
    };
    let live = verdict.reason.allows();
    let service = if verdict.pending { state::SERVICE } else { 0 };
    let cut = if live { 0 } else { state::CUT };
    connection.state.set(bits & !(state::CUT | state::SERVICE) | service | cut);
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

/// Judges a packet from a pod where it leaves the node's stack, its destination final: by its pod's veth if it can be told,
/// else by its source. The endpoint is returned with the verdict, 0 if it is nobody's.
#[inline(always)]
pub fn judge_exit<M: Maps, B: Bytes>(
    maps: &M,
    bytes: B,
    start: Start,
    input: u32,
    packet: &mut Packet,
) -> (u32, Verdict) {
    if let Err(reason) = parse::packet(bytes, start, packet) {
        return (0, Verdict::plain(reason));
    }
    let revision = maps.revision();
    let now = maps.now();
    let Some((ifindex, endpoint)) = sender(maps.policy(), input, &packet.source) else {
        return (0, Verdict::plain(Reason::Unattributed));
    };
    let key = fragment_key(ifindex, direction::EXIT, packet);
    if packet.kind == Kind::LaterFragment {
        return (ifindex, of_first_fragment(maps, &key, now));
    }
    let verdict = judge_final(maps, ifindex, endpoint, packet, revision, now);
    if packet.first_fragment && verdict.reason.allows() {
        note_fragment(maps, &key, now, &verdict);
    }
    (ifindex, verdict)
}

/// Judges what a pod sends to a socket of the host; `packet` has its addresses, ports and protocol. `None` if no pod sent it. Its
/// source, which the pod's own device has checked, tells the pod: kernels before 5.17 do not say which device it came in by.
#[inline(always)]
pub fn judge_host<M: Maps>(maps: &M, packet: &Packet) -> Option<(u32, Verdict)> {
    let revision = maps.revision();
    let now = maps.now();
    let (ifindex, endpoint) = owner(maps.policy(), &packet.source)?;
    let verdict = judge_final(maps, ifindex, endpoint, packet, revision, now);
    if !verdict.reason.allows() {
        let key = refusal_key(ifindex, packet.source, packet.source_port, packet.protocol);
        maps.track(&key, &Connection::new(now, 0, revision, state::CUT));
    }
    Some((ifindex, verdict))
}

/// The endpoint that a packet came from. Behind a bridge the device it came in by is the bridge, and its source must tell.
#[inline(always)]
fn sender<'a, P: Policy>(policy: &'a P, input: u32, source: &Addr) -> Option<(u32, &'a Endpoint)> {
    match policy.endpoint(input) {
        Some(endpoint) => Some((input, endpoint)),
        None => owner(policy, source),
    }
}

/// The endpoint that owns an address.
#[inline(always)]
fn owner<'a, P: Policy>(policy: &'a P, source: &Addr) -> Option<(u32, &'a Endpoint)> {
    let ifindex = policy.address(source)?.ifindex;
    policy.endpoint(ifindex).map(|endpoint| (ifindex, endpoint))
}

/// Policy on a packet from a pod to its final destination.
#[inline(always)]
fn judge_final<M: Maps>(
    maps: &M,
    ifindex: u32,
    endpoint: &Endpoint,
    packet: &Packet,
    revision: u32,
    now: u64,
) -> Verdict {
    if endpoint.closed != 0 {
        return Verdict::plain(Reason::Closed);
    }
    if endpoint.egress == NOT_ISOLATED {
        return Verdict::plain(Reason::NotIsolated);
    }
    let key = track::key(ifindex, direction::EGRESS, packet);
    let known = maps.connection(&key).filter(|known| !known.is_expired(key.protocol, now));
    // A Service that nobody sent on: what the pod's own device noted of it is no verdict.
    let unsent = known.as_ref().is_some_and(|known| known.state.get() & state::SERVICE != 0);
    if packet.kind == Kind::Flow
        && !packet.opens
        && !unsent
        && let Some(connection) = known
        && is_live(maps, endpoint, &key, &connection, revision)
    {
        connection.note(packet, false, now);
        return established(&connection, true);
    }
    let verdict = judge_new(
        maps.policy(),
        endpoint,
        false,
        &packet.destination,
        packet.protocol,
        packet.destination_port,
    );
    if verdict.reason.allows() && packet.kind == Kind::Flow && !unsent {
        maps.track(&key, &Connection::new(now, verdict.rule, revision, 0));
    }
    verdict
}

/// Whether this is how the host's stack says no to what [`judge_host`] has just denied: a reset, or an error.
#[inline(always)]
fn is_refusal<M: Maps, B: Bytes>(maps: &M, bytes: B, hook: &Hook, packet: &Packet, now: u64) -> bool {
    let port = if packet.kind == Kind::IcmpError {
        let mut inner = Packet::default();
        if parse::quoted(bytes, packet.inner, &mut inner).is_err() || inner.source != packet.destination {
            return false;
        }
        Some((inner.source_port, inner.protocol))
    } else if packet.kind == Kind::Flow && packet.resets {
        Some((packet.destination_port, packet.protocol))
    } else {
        None
    };
    let Some((port, protocol)) = port else { return false };
    let key = refusal_key(hook.ifindex, packet.destination, port, protocol);
    maps.connection(&key)
        .is_some_and(|refused| now.saturating_sub(refused.seen.get()) < track::REFUSAL_LIFETIME)
}

/// Under this key a denial at the host's sockets is noted: no real flow has the unspecified address as its other end.
#[inline(always)]
fn refusal_key(ifindex: u32, local: Addr, local_port: u16, protocol: u8) -> ConnKey {
    ConnKey { local, local_port, ifindex, protocol, ..ConnKey::default() }
}

#[inline(always)]
fn fragment_key(ifindex: u32, direction: u8, packet: &Packet) -> FragmentKey {
    FragmentKey {
        source: packet.source,
        destination: packet.destination,
        ifindex,
        id: packet.fragment_id,
        protocol: packet.protocol,
        direction,
        reserved: [0; 2],
    }
}

#[inline(always)]
fn note_fragment<M: Maps>(maps: &M, key: &FragmentKey, now: u64, verdict: &Verdict) {
    maps.note_fragment(key, now & !1 | u64::from(verdict.pending));
}

/// A later fragment goes the way of the first.
#[inline(always)]
fn of_first_fragment<M: Maps>(maps: &M, key: &FragmentKey, now: u64) -> Verdict {
    match maps.fragment(key) {
        Some(seen) if now.saturating_sub(seen) <= track::FRAGMENT_LIFETIME => {
            Verdict { pending: seen & 1 != 0, ..Verdict::plain(Reason::Fragment) }
        }
        _ => Verdict::plain(Reason::OrphanFragment),
    }
}
