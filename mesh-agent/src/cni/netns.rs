//! The pod's side: work in the pod's network namespace, on a thread of its own that enters it and ends.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;

use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::LinkFlags;
use netlink_packet_route::neighbour::NeighbourState;
use netlink_packet_route::route::{RouteAttribute, RouteMessage};
use nix::sched::{CloneFlags, setns};
use rtnetlink::{LinkUnspec, RouteMessageBuilder};

use super::veth::HOST_MAC;
use crate::reconcile::ReconcileError;
use crate::reconcile::netlink::{Netlink, settle};

/// The pods' IPv4 gateway: link-local (RFC 3927), on no interface, known to pods as a permanent neighbour.
pub(super) const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// The pods' IPv6 gateway.
pub(super) const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// The gateway of an address's family.
pub(super) fn gateway(ip: IpAddr) -> IpAddr {
    if ip.is_ipv4() { GATEWAY_V4.into() } else { GATEWAY_V6.into() }
}

/// What the pod's end should be.
#[derive(Debug, Clone)]
pub(super) struct PodEnd {
    pub(super) ifname: String,
    pub(super) ips: Vec<IpAddr>,
}

/// Runs `work` on a thread inside `netns`, with a netlink socket of that namespace.
pub(super) async fn within<T, F>(netns: OwnedFd, work: F) -> Result<T, ReconcileError>
where
    T: Send + 'static,
    F: AsyncFnOnce(Netlink) -> Result<T, ReconcileError> + Send + 'static,
{
    let failed = |message: &dyn std::fmt::Display| ReconcileError::new("pod's network namespace", message);
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let thread = move || {
        let outcome = (|| {
            setns(&netns, CloneFlags::CLONE_NEWNET).map_err(|errno| failed(&errno))?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.map_err(|error| failed(&error))?.block_on(async {
                let netlink = Netlink::connect().map_err(|error| failed(&error))?;
                work(netlink).await
            })
        })();
        // Nobody waits any more when the request was dropped.
        let _ = sender.send(outcome);
    };
    std::thread::Builder::new().name("pod-netns".to_owned()).spawn(thread).map_err(|error| failed(&error))?;
    receiver.await.map_err(|_| failed(&"its thread ended early"))?
}

/// Addresses, neighbours and routes of the pod; its interface and loopback go up.
pub(super) async fn configure(netlink: Netlink, pod: PodEnd) -> Result<(), ReconcileError> {
    let object = format!("{} in the pod", pod.ifname);
    let index = require(&netlink, &pod.ifname).await?;
    let has_v6 = pod.ips.iter().any(IpAddr::is_ipv6);
    // We hand addresses out once: there is no duplicate to detect and no router to hear.
    let v6 = [("disable_ipv6", if has_v6 { "0" } else { "1" }), ("accept_dad", "0"), ("accept_ra", "0")];
    for (key, value) in v6 {
        sysctl("ipv6", &pod.ifname, key, value).map_err(|error| ReconcileError::new(&object, error))?;
    }
    if let Some(lo) = super::veth::index_of(&netlink, "lo").await? {
        let up = LinkUnspec::new_with_index(lo).up().build();
        settle(netlink.handle().link().set(up).execute().await, &[], "lo in the pod")?;
    }
    let up = LinkUnspec::new_with_index(index).up().build();
    settle(netlink.handle().link().set(up).execute().await, &[], &object)?;
    for ip in &pod.ips {
        let mut request = netlink.handle().address().add(index, *ip, host_bits(*ip));
        if ip.is_ipv6() {
            request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        }
        settle(request.execute().await, &[libc::EEXIST], format!("address {ip} on {object}"))?;
        let via = gateway(*ip);
        let neighbour = netlink
            .handle()
            .neighbours()
            .add(index, via)
            .link_layer_address(&HOST_MAC)
            .state(NeighbourState::Permanent)
            .replace();
        settle(neighbour.execute().await, &[], format!("neighbour {via} on {object}"))?;
        let route = default_route(index, via);
        settle(
            netlink.handle().route().add(route).execute().await,
            &[libc::EEXIST],
            format!("default route via {via} on {object}"),
        )?;
    }
    Ok(())
}

fn host_bits(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 32 } else { 128 }
}

fn default_route(index: u32, via: IpAddr) -> RouteMessage {
    match via {
        IpAddr::V4(via) => {
            RouteMessageBuilder::<Ipv4Addr>::new().output_interface(index).gateway(via).onlink().build()
        }
        IpAddr::V6(via) => {
            RouteMessageBuilder::<Ipv6Addr>::new().output_interface(index).gateway(via).onlink().build()
        }
    }
}

/// Compares with what [`configure`] left: link up, every address, a default route per family.
pub(super) async fn check(netlink: Netlink, pod: PodEnd) -> Result<(), ReconcileError> {
    let object = format!("{} in the pod", pod.ifname);
    let index = require(&netlink, &pod.ifname).await?;
    let links = netlink.dump("links", netlink.handle().link().get().execute()).await?;
    let is_up = |up: &LinkFlags| up.contains(LinkFlags::Up);
    if !links.iter().any(|link| link.header.index == index && is_up(&link.header.flags)) {
        return Err(ReconcileError::new(object, "is down"));
    }
    let addresses = netlink.dump("addresses", netlink.handle().address().get().execute()).await?;
    for ip in &pod.ips {
        if !addresses.iter().any(|found| found.header.index == index && is_address(found, *ip)) {
            return Err(ReconcileError::new(object, format!("lacks the address {ip}")));
        }
        let via = gateway(*ip);
        let all = default_route(index, via);
        let family = if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let mut get = netlink.handle().route().get(RouteMessage::default());
        get.message_mut().header.address_family = family;
        let routes = netlink.dump("routes", get.execute()).await?;
        let wanted: Vec<&RouteAttribute> = all
            .attributes
            .iter()
            .filter(|attribute| matches!(attribute, RouteAttribute::Oif(_) | RouteAttribute::Gateway(_)))
            .collect();
        let is_ours = |route: &RouteMessage| {
            route.header.destination_prefix_length == 0
                && wanted.iter().all(|attribute| route.attributes.contains(attribute))
        };
        if !routes.iter().any(is_ours) {
            return Err(ReconcileError::new(object, format!("lacks the default route via {via}")));
        }
    }
    Ok(())
}

fn is_address(message: &AddressMessage, ip: IpAddr) -> bool {
    message.header.prefix_len == host_bits(ip) && message.attributes.contains(&AddressAttribute::Address(ip))
}

async fn require(netlink: &Netlink, name: &str) -> Result<u32, ReconcileError> {
    let found = super::veth::index_of(netlink, name).await?;
    found.ok_or_else(|| ReconcileError::new(format!("link {name} in the pod"), "does not exist"))
}

/// Sets `net/<family>/conf/<interface>/<key>` of the calling thread's namespace. A kernel without IPv6 has
/// nothing to set.
pub(super) fn sysctl(family: &str, interface: &str, key: &str, value: &str) -> Result<(), String> {
    let root = crate::proc_sys::root().join("net").join(family);
    let file = root.join("conf").join(interface).join(key);
    let path = file.display();
    match std::fs::write(&file, value) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => match root.exists() {
            true => Err(format!("{path}: {error}")),
            false => Ok(()),
        },
        Err(error) => Err(format!("{path}: {error}")),
    }
}
