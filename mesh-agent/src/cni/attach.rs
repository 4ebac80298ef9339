//! ADD and CHECK.

use std::net::IpAddr;
use std::os::fd::{AsFd as _, OwnedFd};

use ipnet::IpNet;
use mesh_api::cni::{Attachment, Request};

use super::refusal::Refusal;
use super::{Server, key, netns, ranges, veth};
use crate::ipam::{Ask, Key, Lease};
use crate::names::{is_dns_label, is_dns_subdomain};
use crate::snapshot::ObjectRef;

/// Longest interface name (IFNAMSIZ less the terminator).
const IFNAME_MAX: usize = 15;

impl Server {
    pub(super) async fn add(&self, request: &Request, netns: Option<OwnedFd>) -> Result<Attachment, Refusal> {
        let key = key(request)?;
        let ask = ask(request)?;
        let netns =
            netns.ok_or_else(|| Refusal::environment("CNI_NETNS: no descriptor came with the request"))?;
        self.gate.ready().map_err(Refusal::unavailable)?;
        let _busy = self.hold(&key)?;
        let mesh = self.store.current().cluster.mesh.clone();
        if mesh.external {
            return Err(Refusal::unavailable(super::EXTERNAL));
        }
        let mtu = mesh.mtu;
        let lease = match self.existing(&key, &ask).await? {
            Some(lease) => lease,
            None => {
                let lease = self.lease(&ask).await?;
                if let Err(refusal) = self.build(&lease, mtu, netns).await {
                    return Err(self.undo(&lease, refusal).await);
                }
                lease
            }
        };
        match self.publish(&lease).await {
            Ok(()) => Ok(attachment(&lease, mtu)),
            Err(refusal) => Err(self.undo(&lease, refusal).await),
        }
    }

    /// The same ADD again is answered again; a different one for the same interface is refused. A lease
    /// whose interface went with its namespace is given back first.
    async fn existing(&self, key: &Key, ask: &Ask) -> Result<Option<Lease>, Refusal> {
        let known = match self.ipam.lock().await.as_ref() {
            Ok(ipam) => ipam.lease(key).cloned(),
            Err(error) => return Err(Refusal::unavailable(error.clone())),
        };
        let Some(lease) = known else { return Ok(None) };
        if veth::index_of(&self.netlink, &lease.host_interface).await?.is_none() {
            self.remove(key).await?;
            return Ok(None);
        }
        let same_ips = ask.ips.is_empty() || ask.ips == lease.ips;
        if lease.pod == ask.pod && lease.network == ask.network && same_ips {
            return Ok(Some(lease));
        }
        Err(Refusal::exists(format!("{key} is attached already: pod {}, {:?}", lease.pod, lease.ips)))
    }

    async fn lease(&self, ask: &Ask) -> Result<Lease, Refusal> {
        if self.store.current().cluster.ipam.in_use {
            return self.lease_of_pools(ask).await;
        }
        let cidrs = &self.board.observed().desired.pod_cidrs;
        let ranges = ranges(&self.store.current(), cidrs, Some(&ask.pod));
        self.see_strays().await?;
        let mut ipam = self.ipam.lock().await;
        let ipam = ipam.as_mut().map_err(|error| Refusal::unavailable(error.clone()))?;
        Ok(ipam.allocate(ask, &ranges)?)
    }

    /// Interfaces that nobody knew may have gone since.
    pub(super) async fn see_strays(&self) -> Result<(), Refusal> {
        let mut ipam = self.ipam.lock().await;
        let ipam = ipam.as_mut().map_err(|error| Refusal::unavailable(error.clone()))?;
        if ipam.strays().next().is_some() {
            ipam.set_live(&veth::own(&self.netlink).await?);
        }
        Ok(())
    }

    /// Closed before up, up before it has addresses.
    async fn build(&self, lease: &Lease, mtu: u32, netns: OwnedFd) -> Result<(), Refusal> {
        let interface = &lease.host_interface;
        let index = veth::create(&self.netlink, lease, mtu, netns.as_fd()).await?;
        self.gate
            .attach_closed(interface)
            .map_err(|error| Refusal::io(format!("link {interface}: {error}")))?;
        veth::up(&self.netlink, interface, index).await?;
        let pod = pod_end(lease);
        netns::within(netns, async move |netlink| netns::configure(netlink, pod).await).await?;
        Ok(())
    }

    /// Tells everyone and waits until it is so.
    async fn publish(&self, lease: &Lease) -> Result<(), Refusal> {
        let interface = &lease.host_interface;
        let index = veth::index_of(&self.netlink, interface).await?;
        let index = index.ok_or_else(|| Refusal::io(format!("link {interface}: is gone")))?;
        let mut board = self.board.subscribe();
        let generation = self.store.set_endpoint(interface, lease.endpoint(index));
        let mut last = String::new();
        let wait =
            board.wait_for(|seen| match super::enforced::enforced(seen, generation, interface, &lease.ips) {
                Ok(()) => true,
                Err(missing) => {
                    last = missing;
                    false
                }
            });
        match tokio::time::timeout(self.enforced_within, wait).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(Refusal::try_again("the agent is stopping")),
            Err(_) => Err(Refusal::try_again(format!(
                "generation {generation} is not enforced after {} s: {last}",
                self.enforced_within.as_secs()
            ))),
        }
    }

    async fn undo(&self, lease: &Lease, refusal: Refusal) -> Refusal {
        match self.remove(&lease.key()).await {
            Ok(()) => refusal,
            // The lease stays until DEL or GC succeed: better an address too few than one twice.
            Err(left) => Refusal::io(format!("{refusal}; and it could not be undone: {left}")),
        }
    }

    pub(super) async fn check(
        &self,
        request: &Request,
        netns: Option<OwnedFd>,
    ) -> Result<Attachment, Refusal> {
        let key = key(request)?;
        let netns =
            netns.ok_or_else(|| Refusal::environment("CNI_NETNS: no descriptor came with the request"))?;
        let _busy = self.hold(&key)?;
        let lease = match self.ipam.lock().await.as_ref() {
            Ok(ipam) => ipam.lease(&key).cloned(),
            Err(error) => return Err(Refusal::unavailable(error.clone())),
        };
        let lease = lease.ok_or_else(|| Refusal::unknown(format!("{key} is not attached")))?;
        let interface = &lease.host_interface;
        if veth::index_of(&self.netlink, interface).await?.is_none() {
            return Err(Refusal::differs(format!("link {interface}: is gone")));
        }
        let pod = pod_end(&lease);
        netns::within(netns, async move |netlink| netns::check(netlink, pod).await)
            .await
            .map_err(|error| Refusal::differs(error.to_string()))?;
        let seen = self.board.observed();
        let generation = seen.snapshot.generation;
        super::enforced::enforced(&seen, generation, interface, &lease.ips).map_err(Refusal::differs)?;
        Ok(attachment(&lease, self.store.current().cluster.mesh.mtu))
    }
}

/// Names that end up in paths, messages and policy look-ups are checked here, whoever sent them.
fn ask(request: &Request) -> Result<Ask, Refusal> {
    let ifname = &request.ifname;
    let odd = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    if ifname.len() > IFNAME_MAX || ifname.chars().any(odd) || matches!(ifname.as_str(), "." | ".." | "lo") {
        return Err(Refusal::environment(format!("CNI_IFNAME: {ifname:?} is no interface name")));
    }
    let word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    if !request.container_id.chars().all(word) || request.container_id.len() > 256 {
        return Err(Refusal::environment(
            "CNI_CONTAINERID: only letters, digits, `_`, `.`, `-`, at most 256",
        ));
    }
    let pod = pod(request)?;
    Ok(Ask {
        network: request.network.clone(),
        container_id: request.container_id.clone(),
        ifname: ifname.clone(),
        netns: request.netns.clone(),
        pod,
        pod_uid: request.pod_uid.clone(),
        ips: request.ips.clone(),
    })
}

/// Whom policy takes the interface for. A runtime that names no pod gets an interface that stays closed: no
/// Pod object can ever be the one behind it.
fn pod(request: &Request) -> Result<ObjectRef, Refusal> {
    let (namespace, name) = (&request.pod_namespace, &request.pod_name);
    if namespace.is_empty() && name.is_empty() {
        return Ok(ObjectRef { namespace: String::new(), name: request.container_id.clone() });
    }
    if !is_dns_label(namespace) || !is_dns_subdomain(name) {
        return Err(Refusal::environment(format!(
            "CNI_ARGS: K8S_POD_NAMESPACE={namespace:?} and K8S_POD_NAME={name:?} must name a pod: policy goes by it",
        )));
    }
    Ok(ObjectRef { namespace: namespace.clone(), name: name.clone() })
}

fn pod_end(lease: &Lease) -> netns::PodEnd {
    netns::PodEnd { ifname: lease.ifname.clone(), ips: lease.ips.clone() }
}

fn attachment(lease: &Lease, mtu: u32) -> Attachment {
    Attachment {
        host_interface: lease.host_interface.clone(),
        host_mac: mac(&veth::HOST_MAC),
        pod_mac: mac(&lease.pod_mac),
        addresses: lease.ips.iter().copied().map(IpNet::from).collect(),
        gateways: lease.ips.iter().copied().map(netns::gateway).collect::<Vec<IpAddr>>(),
        mtu,
    }
}

fn mac(bytes: &[u8; 6]) -> String {
    bytes.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_of_no_pod_can_never_pass_for_one() {
        let request = |namespace: &str, name: &str| Request {
            command: mesh_api::cni::Command::Add,
            container_id: "c1".to_owned(),
            ifname: "eth0".to_owned(),
            netns: String::new(),
            network: "margay".to_owned(),
            pod_namespace: namespace.to_owned(),
            pod_name: name.to_owned(),
            pod_uid: String::new(),
            ips: Vec::new(),
            valid_attachments: Vec::new(),
        };
        // No object has an empty namespace, so none can open it.
        assert_eq!(pod(&request("", "")).unwrap().to_string(), "/c1");
        assert_eq!(pod(&request("x", "a")).unwrap().to_string(), "x/a");
        for (namespace, name) in [("", "a"), ("x", ""), ("x/y", "a"), ("x", "../a")] {
            assert!(pod(&request(namespace, name)).is_err(), "{namespace:?} {name:?}");
        }
    }
}
