//! The BPF programs: a thin shell around `verdict`.
//!
//! * `pod_egress`: tc ingress of a pod's host-side veth, what the pod sends.
//! * `pod_ingress`: tc egress of the same veth, what the pod is sent.
//! * `tunnel_ingress`: tc ingress of the tunnel device, which has no Ethernet header.
//! * `exit_ethernet`, `exit_ip`: tc egress of every other device and of the tunnel, what pods send to Services, after DNAT.
//! * `host_ingress`: the host's socket look-up, what pods send to Services with a backend on the host itself.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod programs;

/// On the host there is nothing to run: the package's library is what counts there.
#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Some helpers are for GPL-compatible programs only.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
