//! Replaying: one lab for all cases with the same hosts, pods kept from case to case where they are the same.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::case::{Case, End};
use super::plan::{self, World};
use super::report;
use crate::bins::Bins;
use crate::lab::Lab;
use crate::manifests;
use crate::netns::Netns;
use crate::probe::{self, Outcome, Probe};
use crate::spec::{self, Protocol};

/// Replays all cases of a file; `each` hears of every case as it ends.
pub fn file(
    name: &str,
    cases: &[Case],
    bins: &Bins,
    each: &mut dyn FnMut(&report::Result),
) -> Vec<report::Result> {
    let mut results = Vec::new();
    for (index, (hosts, group)) in plan::group(cases).iter().enumerate() {
        let lab =
            plan::lab(&format!("conformance-{index}"), hosts, group).and_then(|spec| Lab::up(spec, bins));
        let mut replay = lab.map(|lab| Replay { lab, network: BTreeMap::new() });
        for case in group {
            let start = Instant::now();
            let mut probes = 0;
            let wrong = match &mut replay {
                Ok(replay) => {
                    let outcome = replay.case(case, &mut probes);
                    outcome.unwrap_or_else(|error| replay.start_over(&error))
                }
                Err(error) => vec![format!("the lab does not come up: {error:#}")],
            };
            let result = report::Result {
                file: name.into(),
                case: case.name.clone(),
                open: case.is_open(),
                wrong,
                probes,
                took_ms: start.elapsed().as_millis(),
            };
            each(&result);
            results.push(result);
        }
    }
    results
}

struct Replay {
    lab: Lab,
    /// Pods that run, as they were made.
    network: BTreeMap<(String, String), spec::Pod>,
}

type Ask = (End, End, u16, Protocol);

impl Replay {
    /// Replays one case; every wrong probe, in words.
    fn case(&mut self, case: &Case, probes: &mut usize) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        let worlds = plan::worlds(case, &self.lab.node_names())?;
        self.policies(&[])?;
        let mut tried: Vec<&World> = Vec::new();
        for world in worlds.iter().rev() {
            // Backwards, so that the first step's world is the one that stands when the steps begin.
            if tried.contains(&world) {
                continue;
            }
            tried.push(world);
            self.world(world)?;
            let asks: Vec<(Ask, bool)> =
                plan::baseline(case, world).into_iter().map(|ask| (ask, true)).collect();
            self.ask(world, &asks, "before the first policy", &mut wrong, probes)?;
        }
        if !wrong.is_empty() {
            return Ok(wrong);
        }
        for (index, (step, world)) in case.steps.iter().zip(&worlds).enumerate() {
            self.world(world)?;
            self.policies(&step.policies)?;
            let asks: Vec<(Ask, bool)> = step
                .expected
                .iter()
                .map(|expected| {
                    ((expected.0.clone(), expected.1.clone(), expected.2, expected.3), expected.4)
                })
                .collect();
            self.ask(world, &asks, &format!("step {}", index + 1), &mut wrong, probes)?;
        }
        Ok(wrong)
    }

    /// After a case that could not be replayed to its end: what it left must not fail the next one.
    fn start_over(&mut self, error: &anyhow::Error) -> Vec<String> {
        let mut wrong = vec![format!("{error:#}")];
        let pods: Vec<spec::Pod> = self.lab.pods().map(|pod| pod.spec.clone()).collect();
        for pod in pods {
            if let Err(error) = self.lab.remove_pod(&pod.namespace, &pod.name) {
                wrong.push(format!("clean-up after it: {error:#}"));
            }
        }
        self.network.clear();
        wrong
    }

    /// Makes namespaces and pods those of a world, keeping the pods whose network stays the same.
    fn world(&mut self, world: &World) -> Result<()> {
        let wanted = |key: &(String, String), pod: &spec::Pod| {
            world.pods.iter().any(|(spec, status)| {
                (&spec.namespace, &spec.name) == (&key.0, &key.1)
                    && plan::same_network(spec, pod)
                    && plan::has_network(spec, status)
            })
        };
        let gone: Vec<_> =
            self.network.iter().filter(|(key, pod)| !wanted(key, pod)).map(|(key, _)| key.clone()).collect();
        for key in gone {
            self.lab.remove_pod(&key.0, &key.1)?;
            self.network.remove(&key);
        }
        let namespaces: Vec<Value> = world.namespaces.iter().map(manifests::namespace).collect();
        self.replace(|kind| kind == "Namespace", &namespaces)?;
        let objects: Vec<String> = world
            .pods
            .iter()
            .map(|(pod, status)| manifests::file_name(&manifests::pod(pod, status)))
            .collect();
        for old in self.lab.objects(|kind| kind == "Pod") {
            if !objects.contains(&manifests::file_name(&old)) {
                self.lab.delete(&old)?;
            }
        }
        let mut new = Vec::new();
        for (pod, status) in &world.pods {
            if !plan::has_network(pod, status) {
                self.lab.put(manifests::pod(pod, status))?;
            } else if self.network.contains_key(&(pod.namespace.clone(), pod.name.clone())) {
                self.lab.update_pod(pod, status)?;
            } else {
                new.push((pod.clone(), status.clone()));
            }
        }
        if !new.is_empty() {
            self.lab.add_pods(&new)?;
        }
        for (pod, status) in &world.pods {
            if plan::has_network(pod, status) {
                self.network.insert((pod.namespace.clone(), pod.name.clone()), pod.clone());
            }
        }
        self.lab.enforced()
    }

    /// Makes the objects of some kinds exactly these; what is the same is not written again.
    fn replace(&mut self, of: impl Fn(&str) -> bool, objects: &[Value]) -> Result<()> {
        let files: Vec<String> = objects.iter().map(manifests::file_name).collect();
        for old in self.lab.objects(of) {
            if !files.contains(&manifests::file_name(&old)) {
                self.lab.delete(&old)?;
            }
        }
        for object in objects {
            self.lab.put(object.clone())?;
        }
        Ok(())
    }

    fn policies(&mut self, policies: &[Value]) -> Result<()> {
        self.replace(|kind| !["MeshConfiguration", "Node", "Namespace", "Pod"].contains(&kind), policies)?;
        self.lab.enforced().context("enforce the policies")
    }

    /// Probes at once; what is not as expected goes to `wrong`.
    fn ask(
        &mut self,
        world: &World,
        asks: &[(Ask, bool)],
        when: &str,
        wrong: &mut Vec<String>,
        count: &mut usize,
    ) -> Result<()> {
        let mut probes = Vec::new();
        let mut expected = Vec::new();
        for ((src, dst, port, protocol), allowed) in asks {
            let text = format!("{when}: {src} -> {dst} {port}/{protocol}");
            let (from, to) = (self.end(world, src)?, self.end(world, dst)?);
            let (Some(from), Some(to)) = (from, to) else {
                // An end without an address: nothing can get through, and nothing can be sent.
                if *allowed {
                    wrong.push(format!("{text}: expected allowed, but an end has no address"));
                }
                continue;
            };
            let pair = from.ips.iter().find_map(|src| {
                to.ips.iter().find(|dst| dst.is_ipv4() == src.is_ipv4()).map(|dst| (*src, *dst))
            });
            let Some((src_ip, dst_ip)) = pair else {
                bail!("{text}: the ends have no address family in common");
            };
            if to.host {
                self.lab.listen_on_host(&to.name, dst_ip, *port, *protocol)?;
            }
            let (port, protocol) = (*port, *protocol);
            let probe =
                Probe { from: from.netns, src: src_ip, dst: dst_ip, port, protocol, listener: to.name };
            probes.push((probe, *allowed));
            expected.push((text, *allowed));
        }
        *count += probes.len();
        for ((text, allowed), outcome) in expected.into_iter().zip(probe::all(&probes)?) {
            let want = if allowed { Outcome::Allowed } else { Outcome::Dropped };
            if outcome != want {
                let want = if allowed { "allowed" } else { "dropped" };
                wrong.push(format!("{text}: expected {want}, got {outcome}"));
            }
        }
        Ok(())
    }

    /// Where an end is; None without an address.
    fn end(&self, world: &World, end: &End) -> Result<Option<Place>> {
        let host = |name: &str| -> Result<Option<Place>> {
            let netns = self.lab.host(name)?.netns().clone();
            Ok(Some(Place { netns, ips: self.lab.ips(name)?, name: name.into(), host: true }))
        };
        match end {
            End::Node(name) | End::External(name) => host(name),
            End::Pod(namespace, name) => {
                let known =
                    world.pods.iter().find(|(pod, _)| (&pod.namespace, &pod.name) == (namespace, name));
                let (spec, status) = known.with_context(|| format!("the case has no pod {end}"))?;
                if !plan::has_network(spec, status) {
                    return Ok(None);
                }
                let pod = self.lab.pod(namespace, name)?;
                if spec.host_network {
                    return host(&spec.node);
                }
                Ok(Some(Place {
                    netns: pod.netns.clone(),
                    ips: pod.ips.clone(),
                    name: end.to_string(),
                    host: false,
                }))
            }
        }
    }
}

/// Where an end of a probe is.
struct Place {
    netns: Netns,
    ips: Vec<IpAddr>,
    /// What its listener answers with.
    name: String,
    /// It is a host, which listens on whatever is probed there.
    host: bool,
}
