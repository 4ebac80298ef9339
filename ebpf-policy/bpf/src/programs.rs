//! The entry points: context to verdict, verdict to action, counter and event.

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use margay_bpf::layout::{Count, CounterKey, Event, direction};
use margay_bpf::parse::{Bytes, Packet, Start};
use margay_bpf::verdict::{self, Hook, Verdict};

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
    pod(&ctx, direction::EGRESS)
}

/// What a pod is sent.
#[classifier]
pub fn pod_ingress(ctx: TcContext) -> i32 {
    pod(&ctx, direction::INGRESS)
}

/// What comes out of the tunnel.
#[classifier]
pub fn tunnel_ingress(ctx: TcContext) -> i32 {
    let mut packet = Packet::default();
    let verdict = verdict::judge_tunnel(&Kernel, Skb(&ctx), &mut packet);
    conclude(&ctx, ifindex(&ctx), direction::INGRESS, &packet, &verdict)
}

#[inline(always)]
fn pod(ctx: &TcContext, way: u8) -> i32 {
    // SAFETY: the context is valid while the program runs.
    let input = unsafe { (*ctx.skb.skb).ingress_ifindex };
    let hook = Hook { ifindex: ifindex(ctx), direction: way, input };
    let mut packet = Packet::default();
    let verdict = verdict::judge_pod(&Kernel, Skb(ctx), Start::Ethernet, hook, &mut packet);
    conclude(ctx, hook.ifindex, way, &packet, &verdict)
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
        report(ctx, ifindex, way, packet, verdict);
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
fn report(ctx: &TcContext, ifindex: u32, way: u8, packet: &Packet, verdict: &Verdict) {
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
        length: ctx.len(),
        source_port: packet.source_port,
        destination_port: packet.destination_port,
        protocol: packet.protocol,
        direction: way,
        reason: verdict.reason as u8,
        reserved: 0,
    });
    slot.submit(0);
}
