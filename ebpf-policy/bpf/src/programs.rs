//! The entry points: context to verdict, verdict to action, counter and event.

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::macros::{classifier, sk_lookup};
use aya_ebpf::programs::{SkLookupContext, TcContext};
use margay_bpf::layout::{Addr, Count, CounterKey, Event, direction, tag};
use margay_bpf::parse::{Bytes, Packet, Start, protocol};
use margay_bpf::verdict::{self, Hook, Policy as _, Verdict};

use crate::maps::{COUNTERS, EVENTS, EVENTS_LOST, Kernel};

/// A packet's bytes by helper call, which reads paged and linear data alike.
#[derive(Clone, Copy)]
struct Skb<'a>(&'a TcContext);

impl Bytes for Skb<'_> {
    #[inline(always)]
    fn load<const N: usize>(self, offset: u32) -> Option<[u8; N]> {
        self.0.load(offset as usize).ok()
    }
}

/// What a pod sends.
#[classifier]
pub fn pod_egress(ctx: TcContext) -> i32 {
    let hook = Hook { ifindex: ifindex(&ctx), direction: direction::EGRESS, input: input(&ctx) };
    let mut packet = Packet::default();
    let verdict = verdict::judge_pod(&Kernel, Skb(&ctx), Start::Ethernet, hook, &mut packet);
    set_tag(&ctx, if verdict.pending { tag::PENDING } else { tag::JUDGED });
    conclude(&ctx, hook.ifindex, hook.direction, &packet, &verdict)
}

/// What a pod is sent.
#[classifier]
pub fn pod_ingress(ctx: TcContext) -> i32 {
    let hook = Hook { ifindex: ifindex(&ctx), direction: direction::INGRESS, input: input(&ctx) };
    // By way of a Service to itself it is no egress.
    if hook.input != hook.ifindex && leave(&ctx, Start::Ethernet) == TC_ACT_SHOT {
        return TC_ACT_SHOT;
    }
    let mut packet = Packet::default();
    let verdict = verdict::judge_pod(&Kernel, Skb(&ctx), Start::Ethernet, hook, &mut packet);
    conclude(&ctx, hook.ifindex, hook.direction, &packet, &verdict)
}

/// What comes out of the tunnel.
#[classifier]
pub fn tunnel_ingress(ctx: TcContext) -> i32 {
    let mut packet = Packet::default();
    let verdict = verdict::judge_tunnel(&Kernel, Skb(&ctx), &mut packet);
    conclude(&ctx, ifindex(&ctx), direction::INGRESS, &packet, &verdict)
}

/// What leaves by a device with Ethernet headers.
#[classifier]
pub fn exit_ethernet(ctx: TcContext) -> i32 {
    leave(&ctx, Start::Ethernet)
}

/// What leaves by a device without a link header, such as the tunnel.
#[classifier]
pub fn exit_ip(ctx: TcContext) -> i32 {
    leave(&ctx, Start::Ip)
}

/// What is to be given to a socket of the host. Denied, the sender is told so; `pod_ingress` stops that.
#[sk_lookup]
pub fn host_ingress(ctx: SkLookupContext) -> u32 {
    const AF_INET: u32 = 2;
    const SK_DROP: u32 = 0;
    const SK_PASS: u32 = 1;
    const TCP: u32 = protocol::TCP as u32;
    // Volatile, or reads of fields at two places become one at a computed place, which the verifier refuses.
    macro_rules! field {
        ($($path:tt)*) => {
            // SAFETY: the context is valid while the program runs.
            unsafe { core::ptr::read_volatile(&raw const (*ctx.lookup).$($path)*) }
        };
    }
    let protocol = field!(protocol);
    let v4 = (Addr::v4(field!(remote_ip4).to_ne_bytes()), Addr::v4(field!(local_ip4).to_ne_bytes()));
    let v6 = (
        Addr([field!(remote_ip6[0]), field!(remote_ip6[1]), field!(remote_ip6[2]), field!(remote_ip6[3])]),
        Addr([field!(local_ip6[0]), field!(local_ip6[1]), field!(local_ip6[2]), field!(local_ip6[3])]),
    );
    let (source, destination) = if field!(family) == AF_INET { v4 } else { v6 };
    let packet = Packet {
        source,
        destination,
        source_port: u16::from_be(field!(remote_port)),
        destination_port: field!(local_port) as u16,
        protocol: protocol as u8,
        // A listener is looked up by SYNs only.
        opens: protocol == TCP,
        ..Packet::default()
    };
    match verdict::judge_host(&Kernel, &packet) {
        Some((ifindex, verdict)) if !verdict.reason.allows() => {
            count(ifindex, direction::EGRESS, &verdict, 0);
            report(0, ifindex, direction::EGRESS, &packet, &verdict);
            SK_DROP
        }
        _ => SK_PASS,
    }
}

/// Judges what a pod sent to a Service, now that its destination is final. Everything else was judged before, or is no pod's.
#[inline(always)]
fn leave(ctx: &TcContext, start: Start) -> i32 {
    // SAFETY: the context is valid while the program runs.
    let tag = unsafe { (*ctx.skb.skb).tc_index };
    let input = input(ctx);
    if tag == tag::JUDGED || input == 0 && tag != tag::PENDING {
        return TC_ACT_UNSPEC;
    }
    if tag != tag::PENDING && Kernel.endpoint(input).is_none() {
        return TC_ACT_UNSPEC;
    }
    let mut packet = Packet::default();
    let (from, verdict) = verdict::judge_exit(&Kernel, Skb(ctx), start, input, &mut packet);
    if verdict.reason.allows() {
        // Devices may be stacked.
        set_tag(ctx, tag::JUDGED);
        return TC_ACT_UNSPEC;
    }
    conclude(ctx, if from == 0 { ifindex(ctx) } else { from }, direction::EGRESS, &packet, &verdict)
}

#[inline(always)]
fn input(ctx: &TcContext) -> u32 {
    // SAFETY: as above.
    unsafe { (*ctx.skb.skb).ingress_ifindex }
}

#[inline(always)]
fn set_tag(ctx: &TcContext, tag: u32) {
    // SAFETY: as above; the verifier lets a classifier write this field.
    unsafe { (*ctx.skb.skb).tc_index = tag };
}

#[inline(always)]
fn ifindex(ctx: &TcContext) -> u32 {
    // SAFETY: as above.
    unsafe { (*ctx.skb.skb).ifindex }
}

/// Counts, reports, and turns the verdict into an action: denied is dropped in silence, allowed goes on to whatever other
/// programs are attached.
#[inline(always)]
fn conclude(ctx: &TcContext, ifindex: u32, way: u8, packet: &Packet, verdict: &Verdict) -> i32 {
    count(ifindex, way, verdict, ctx.len());
    if verdict.reason.allows() {
        return TC_ACT_UNSPEC;
    }
    if verdict.reason.is_reported() {
        report(ctx.len(), ifindex, way, packet, verdict);
    }
    TC_ACT_SHOT
}

#[inline(always)]
fn count(ifindex: u32, way: u8, verdict: &Verdict, length: u32) {
    let key = CounterKey { ifindex, direction: way, reason: verdict.reason as u8, reserved: [0; 2] };
    if let Some(count) = COUNTERS.get_ptr_mut(&key) {
        // SAFETY: this CPU's own value.
        unsafe {
            (*count).packets += 1;
            (*count).bytes += u64::from(length);
        }
    } else {
        let _ = COUNTERS.insert(&key, Count { packets: 1, bytes: u64::from(length) }, 0);
    }
}

#[inline(always)]
fn report(length: u32, ifindex: u32, way: u8, packet: &Packet, verdict: &Verdict) {
    let Some(mut slot) = EVENTS.reserve::<Event>(0) else {
        if let Some(lost) = EVENTS_LOST.get_ptr_mut(0) {
            // SAFETY: this CPU's own value.
            unsafe { *lost += 1 };
        }
        return;
    };
    slot.write(Event {
        // SAFETY: the helper has no precondition.
        time: unsafe { bpf_ktime_get_ns() },
        set: verdict.set,
        rule: verdict.rule,
        identity: verdict.identity,
        source: packet.source,
        destination: packet.destination,
        ifindex,
        length,
        source_port: packet.source_port,
        destination_port: packet.destination_port,
        protocol: packet.protocol,
        direction: way,
        reason: verdict.reason as u8,
        reserved: 0,
    });
    slot.submit(0);
}
