//! One agent in a large cluster: a real API server, a real agent with its datapath, and as many other nodes as wished, whose
//! agents are the example `many_agents` of mesh-agent.

pub mod table;
pub mod world;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use mesh_api::defaults::DEVICES;
use serde::Serialize;
use serde_json::{Value, json};

use crate::bins::Bins;
use crate::cluster::{Client, Cluster};
use crate::host::checked;
use crate::lab::{Lab, datapath_unit};
use crate::spec;
use crate::wait;

const NODE: &str = "real";
const SYSTEM: &str = "margay-system";
const KUBECONFIGS: &str = "/run/many-agents";
/// Clock ticks a second in /proc (USER_HZ).
const TICKS: f64 = 100.0;

/// How large, and for how long.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Size {
    /// Nodes besides the real one.
    pub nodes: u32,
    /// Pods on each of them.
    pub pods_each: usize,
    /// Pods of the real node.
    pub own_pods: usize,
    /// How many of them have a simulated agent; the others are a Node object that says what one has said.
    pub agents: u32,
    /// Simulated agents that follow pods.
    pub with_pods: u32,
    /// Changes of a node whose way to the real one's device is timed.
    pub changes: usize,
    /// Seconds of rest.
    pub rest_s: u64,
    /// Agents that restart at the same time.
    pub batch: usize,
}

impl Size {
    /// What the goals are about.
    pub const FULL: Self = Self {
        nodes: 999,
        agents: 999,
        pods_each: 20,
        own_pods: 20,
        with_pods: 50,
        changes: 200,
        rest_s: 600,
        batch: 100,
    };
    /// The same cluster with less patience.
    pub const QUICK: Self = Self { changes: 20, rest_s: 30, ..Self::FULL };
}

/// What was found.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    /// Seconds to make the cluster, and to start its agents.
    pub setup_s: (f64, f64),
    /// Seconds from the start of the real agent until all is in its device and maps.
    pub converged_s: f64,
    /// CPU seconds that took.
    pub converged_cpu_s: f64,
    /// MiB of memory at most until then, and afterwards.
    pub rss_mib: (f64, f64),
    /// MiB of mesh-datapath's two processes.
    pub datapath_rss_mib: f64,
    /// Share of a core at rest.
    pub rest_core: f64,
    /// Lists that any agent asked for at rest.
    pub rest_lists: u64,
    /// Writes per node and five minutes at rest.
    pub rest_writes: f64,
    /// Milliseconds from a change to the device: median, 99 of 100, longest.
    pub change_ms: (f64, f64, f64),
    /// CPU seconds of the real agent per change.
    pub change_cpu_s: f64,
    /// Seconds that the restart of all took, requests a second on average, and in the busiest second: lists, gets and writes of the
    /// kinds that agents read and write. Watches are not among them: they are counted when they end.
    pub restart: (f64, f64, f64),
}

/// The cluster with everybody in it.
struct Scale {
    lab: Lab,
    size: Size,
    others: Others,
}

/// Measures it. Says on standard error what it is at.
pub fn run(bins: &Bins, size: Size) -> Result<Outcome> {
    let start = Instant::now();
    let tell = |what: &str| eprintln!("[{:4} s] scale: {what}", start.elapsed().as_secs());
    let mut out = Outcome::default();
    tell(&format!("making {} nodes and {} pods", size.nodes + 1, size.nodes as usize * size.pods_each));
    let lab = cluster(bins, size)?;
    out.setup_s.0 = start.elapsed().as_secs_f64();
    tell("starting their agents");
    let mut scale = Scale { others: Others::start(bins, &lab, size)?, lab, size };
    out.setup_s.1 = start.elapsed().as_secs_f64() - out.setup_s.0;
    tell("starting the real agent");
    scale.converge(&mut out)?;
    tell("changing nodes");
    scale.change(&mut out)?;
    tell(&format!("resting for {} s", size.rest_s));
    scale.rest(&mut out)?;
    tell(&format!("restarting all, {} at a time", size.batch));
    scale.restart(&mut out)?;
    Ok(out)
}

fn cluster(bins: &Bins, size: Size) -> Result<Lab> {
    let mut text = format!(
        "name: scale\nnodes:\n  - {{name: {NODE}, ips: [192.0.2.1, '2001:db8::1'], podCIDRs: [10.68.0.0/24, 'fd00:64:ffff::/64']}}\n\
         apiServer: {{ips: [192.0.2.100, '2001:db8::100']}}\nmesh: {{}}\npods:\n"
    );
    for n in 0..size.own_pods {
        let (namespace, tier) =
            (world::namespace(n % world::NAMESPACES), ["front", "web"].get(n % 2).unwrap_or(&""));
        text += &format!(
            "  - {{namespace: {namespace}, name: own-{n}, node: {NODE}, labels: {{tier: {tier}}}}}\n"
        );
    }
    let mut lab = Lab::plug(spec::Lab::parse(&text)?, bins)?;
    lab.address()?;
    lab.write_cluster()?;
    lab.write_node(NODE)?;
    let cluster = lab.cluster()?;
    let client = cluster.client();
    let mesh = json!({"spec": {"pools": [{"cidr": "10.64.0.0/10"}, {"cidr": "fd00:64::/32"}]}});
    cluster.patch("meshconfiguration", None, "default", &mesh)?;
    for n in 0..world::NAMESPACES {
        let name = world::namespace(n);
        if n >= size.own_pods {
            let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
            client.apply(&namespace)?;
        }
        let path = format!("/apis/networking.k8s.io/v1/namespaces/{name}/networkpolicies");
        world::policies(n).iter().try_for_each(|policy| world::create(&client, &path, policy))?;
    }
    // Nobody but an agent may announce; these agents begin with what they have announced before.
    let bindings = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings";
    let kept = client.ask("GET", bindings, None)?["items"].as_array().cloned().unwrap_or_default();
    cluster.kubectl(&["delete", "validatingadmissionpolicybindings", "--all"])?;
    let nodes = nodes(bins, size)?;
    wait::until("nodes to be let in", Duration::from_secs(30), || {
        nodes.first().map_or(Ok(()), |node| world::create(&client, "/api/v1/nodes", node)).map(Some)
    })?;
    world::each(nodes.get(1..).unwrap_or_default(), |node| world::create(&client, "/api/v1/nodes", node))?;
    for mut binding in kept {
        for field in ["resourceVersion", "uid", "creationTimestamp", "generation", "managedFields"] {
            binding["metadata"].as_object_mut().and_then(|metadata| metadata.remove(field));
        }
        world::create(&client, bindings, &binding)?;
    }
    let pods: Vec<(usize, usize)> =
        (0..nodes.len()).flat_map(|node| (0..size.pods_each).map(move |k| (node, k))).collect();
    world::each(&pods, |(node, k)| {
        let of = nodes.get(*node).context("a node")?;
        let pod = world::pod(of, *k, node * size.pods_each + k);
        let namespace = pod["metadata"]["namespace"].as_str().unwrap_or_default();
        world::create(&client, &format!("/api/v1/namespaces/{namespace}/pods"), &pod)
    })?;
    Ok(lab)
}

fn helper(bins: &Bins) -> Result<String> {
    Ok(bins.program("examples/many_agents")?.to_string_lossy().into_owned())
}

fn nodes(bins: &Bins, size: Size) -> Result<Vec<Value>> {
    let mut command = std::process::Command::new(helper(bins)?);
    let output = command.args(["--count", &size.nodes.to_string(), "nodes"]).output();
    let text = checked("many_agents nodes", output.context("run many_agents")?)?;
    serde_json::from_str(&text).context("many_agents nodes")
}

impl Scale {
    fn client(&self) -> Result<Client> {
        Ok(self.lab.cluster()?.client())
    }

    fn converge(&mut self, out: &mut Outcome) -> Result<()> {
        for device in DEVICES {
            self.lab.start_device(NODE, device)?;
        }
        self.lab.start_agent(NODE)?;
        // Its own pods come by CNI once it runs; what is timed is a start with all of them there.
        self.wait_settled(Duration::from_secs(120))?;
        self.lab.start_pods()?;
        let host = self.lab.host(NODE)?;
        let (before, _) = host.unit("mesh-agent")?;
        let begin = Instant::now();
        host.kill_unit("mesh-agent")?;
        wait::until("the agent to be anew", Duration::from_secs(20), || {
            let (now, _) = host.unit("mesh-agent")?;
            Ok(now.filter(|now| Some(*now) != before).map(drop))
        })?;
        self.wait_settled(Duration::from_secs(120))?;
        out.converged_s = begin.elapsed().as_secs_f64();
        let usage = self.usage("mesh-agent")?;
        out.converged_cpu_s = usage.cpu_s;
        out.rss_mib = (usage.peak_mib, usage.rss_mib);
        out.datapath_rss_mib = 0.0;
        for device in DEVICES {
            let pid = host.child_of_unit(&datapath_unit(device))?;
            out.datapath_rss_mib += self.usage_of(pid)?.rss_mib;
        }
        Ok(())
    }

    /// Until the agent's sources, plan, policy and device hold all there is.
    fn wait_settled(&self, limit: Duration) -> Result<()> {
        let agent = self.lab.agent(NODE)?;
        let (nodes, pods) = (self.size.nodes as usize, self.size.nodes as usize * self.size.pods_each);
        wait::until("the real agent to know all", limit, || {
            let status = agent.status()?;
            let objects: usize = status.sources.iter().map(|source| source.objects).sum();
            let generation = &status.generation;
            ensure!(status.peers.len() == nodes, "{} peers", status.peers.len());
            ensure!(objects > pods, "{objects} objects");
            ensure!(
                generation.enforced >= generation.snapshot && generation.policy >= generation.snapshot,
                "{generation:?}"
            );
            Ok(Some(()))
        })?;
        let shown = self.lab.host(NODE)?.run(&["wg", "show", "margay0", "allowed-ips"])?;
        let with = shown.lines().filter(|line| line.contains('/')).count();
        ensure!(with == nodes, "{with} peers of the device have allowed IPs");
        Ok(())
    }

    fn change(&mut self, out: &mut Outcome) -> Result<()> {
        let before = self.usage("mesh-agent")?.cpu_s;
        let mut took = Vec::new();
        for change in 0..self.size.changes {
            let node = (change as u32 * 37) % self.size.agents + 1;
            let port = 40_000 + change;
            let begin = Instant::now();
            self.others.order(&format!("port {node} {port}"))?;
            wait::until(format!("port {port} to be the device's"), Duration::from_secs(30), || {
                let shown = self.lab.host(NODE)?.run(&["wg", "show", "margay0", "endpoints"])?;
                Ok(shown.contains(&format!(":{port}\n")).then_some(()))
            })?;
            took.push(begin.elapsed().as_secs_f64() * 1000.0);
        }
        took.sort_by(f64::total_cmp);
        let at = |share: f64| took.get((took.len() as f64 * share) as usize).or(took.last()).copied();
        out.change_ms = (
            at(0.5).unwrap_or_default(),
            at(0.99).unwrap_or_default(),
            took.last().copied().unwrap_or_default(),
        );
        let after = self.usage("mesh-agent")?.cpu_s;
        out.change_cpu_s = (after - before) / self.size.changes as f64;
        Ok(())
    }

    fn rest(&mut self, out: &mut Outcome) -> Result<()> {
        // What the changes set off comes to its end first.
        let quiet = self.usage("mesh-agent")?;
        wait::until("the agent to be at rest", Duration::from_secs(60), || {
            std::thread::sleep(Duration::from_secs(2));
            let now = self.usage("mesh-agent")?.cpu_s;
            std::thread::sleep(Duration::from_secs(2));
            Ok((self.usage("mesh-agent")?.cpu_s - now < 0.1).then_some(()))
        })
        .with_context(|| format!("{quiet:?}"))?;
        let (requests, usage, begin) = (self.requests()?, self.usage("mesh-agent")?, Instant::now());
        std::thread::sleep(Duration::from_secs(self.size.rest_s));
        let (after, now, lasted) =
            (self.requests()?, self.usage("mesh-agent")?, begin.elapsed().as_secs_f64());
        out.rest_core = (now.cpu_s - usage.cpu_s) / lasted;
        out.rss_mib.1 = now.rss_mib;
        out.rest_lists = after.lists - requests.lists;
        let nodes = f64::from(self.size.nodes + 1);
        out.rest_writes = (after.writes - requests.writes) as f64 / nodes / lasted * 300.0;
        Ok(())
    }

    fn restart(&mut self, out: &mut Outcome) -> Result<()> {
        let (before, begin) = (self.requests()?, Instant::now());
        let done = AtomicBool::new(false);
        let client = self.client()?;
        let peak = std::thread::scope(|scope| -> Result<f64> {
            let watcher = scope.spawn(|| -> Result<f64> {
                let (mut peak, mut last, mut at) = (0.0f64, requests(&client)?, Instant::now());
                while !done.load(Ordering::SeqCst) {
                    std::thread::sleep(Duration::from_secs(1));
                    let (now, then) = (requests(&client)?, Instant::now());
                    peak = peak.max((now.all - last.all) as f64 / (then - at).as_secs_f64());
                    (last, at) = (now, then);
                }
                Ok(peak)
            });
            let restarted = (|| {
                self.lab.host(NODE)?.kill_unit("mesh-agent")?;
                self.others.order(&format!("restart {}", self.size.batch))?;
                self.others.wait_for("ready")?;
                self.wait_settled(Duration::from_secs(120))
            })();
            done.store(true, Ordering::SeqCst);
            let peak = watcher.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            restarted.and(peak)
        })?;
        let lasted = begin.elapsed().as_secs_f64();
        let all = self.requests()?.all - before.all;
        out.restart = (lasted, all as f64 / lasted, peak);
        Ok(())
    }

    fn requests(&self) -> Result<Requests> {
        requests(&self.client()?)
    }

    fn usage(&self, unit: &str) -> Result<Usage> {
        let (pid, _) = self.lab.host(NODE)?.unit(unit)?;
        self.usage_of(pid.with_context(|| format!("{unit} is down"))?)
    }

    /// Of a process, by its PID inside the host.
    fn usage_of(&self, pid: i32) -> Result<Usage> {
        let host = self.lab.host(NODE)?;
        let read = |file: &str| {
            let path = host.path(&format!("/proc/{pid}/{file}"));
            std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
        };
        let (status, stat) = (read("status")?, read("stat")?);
        let kib = |field: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(field));
            line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok())
        };
        // After the command's name in parentheses: utime and stime are the 12th and 13th.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |at: usize| fields.get(at).and_then(|text| text.parse::<f64>().ok()).context("CPU time");
        Ok(Usage {
            cpu_s: (ticks(11)? + ticks(12)?) / TICKS,
            rss_mib: kib("VmRSS:").context("VmRSS")? / 1024.0,
            peak_mib: kib("VmHWM:").context("VmHWM")? / 1024.0,
        })
    }
}

/// What a process has used.
#[derive(Debug, Clone, Copy)]
struct Usage {
    cpu_s: f64,
    rss_mib: f64,
    peak_mib: f64,
}

/// What the API server has counted, watches and our own looks at it aside.
#[derive(Debug, Clone, Copy, Default)]
struct Requests {
    all: u64,
    lists: u64,
    writes: u64,
}

fn requests(client: &Client) -> Result<Requests> {
    let body = client.call("GET", "/metrics", None)?.good()?;
    let mut sums: BTreeMap<String, f64> = BTreeMap::new();
    for line in String::from_utf8_lossy(&body).lines() {
        let Some(labels) = line.strip_prefix("apiserver_request_total{") else { continue };
        let label = |name: &str| {
            let (_, rest) = labels.split_once(&format!("{name}=\""))?;
            rest.split('"').next()
        };
        // Leases, endpoints and the like are the API server's own.
        let resource = label("resource").unwrap_or_default();
        let ours = [
            "nodes",
            "pods",
            "namespaces",
            "services",
            "networkpolicies",
            "meshconfigurations",
            "meshnodestatuses",
            "events",
        ];
        let value = line.rsplit(' ').next().and_then(|text| text.parse::<f64>().ok());
        if let (Some(verb), Some(value), true) = (label("verb"), value, ours.contains(&resource)) {
            *sums.entry(verb.to_owned()).or_default() += value;
        }
    }
    let of = |verbs: &[&str]| verbs.iter().filter_map(|verb| sums.get(*verb)).sum::<f64>() as u64;
    Ok(Requests {
        all: sums.values().sum::<f64>() as u64,
        lists: of(&["LIST"]),
        writes: of(&["APPLY", "PATCH", "PUT", "POST"]),
    })
}

/// The other agents.
#[derive(Debug)]
struct Others {
    child: Child,
    orders: ChildStdin,
    words: BufReader<ChildStdout>,
}

impl Others {
    fn start(bins: &Bins, lab: &Lab, size: Size) -> Result<Self> {
        let cluster = lab.cluster()?;
        credentials(&cluster, size)?;
        let (count, nodes) = (size.agents.to_string(), (size.nodes + 1).to_string());
        let with_pods = size.with_pods.to_string();
        let helper = helper(bins)?;
        let argv = [
            "nice",
            "-n",
            "5",
            helper.as_str(),
            "--count",
            &count,
            "run",
            "--kubeconfigs",
            KUBECONFIGS,
            "--with-pods",
            &with_pods,
            "--nodes",
            &nodes,
        ];
        let mut child = cluster
            .host()
            .command(&argv)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start many_agents")?;
        let (orders, words) = (child.stdin.take(), child.stdout.take());
        let mut others = Self {
            child,
            orders: orders.context("standard input of many_agents")?,
            words: BufReader::new(words.context("standard output of many_agents")?),
        };
        others.wait_for("ready")?;
        Ok(others)
    }

    fn order(&mut self, line: &str) -> Result<()> {
        writeln!(self.orders, "{line}").context("tell many_agents")
    }

    fn wait_for(&mut self, word: &str) -> Result<()> {
        let mut line = String::new();
        self.words.read_line(&mut line).context("hear many_agents")?;
        if line.trim() != word {
            bail!("many_agents said {line:?}, not {word:?}");
        }
        Ok(())
    }
}

impl Drop for Others {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A token for each agent, bound to a pod of its node.
fn credentials(cluster: &Cluster<'_>, size: Size) -> Result<()> {
    let (host, client) = (cluster.host(), cluster.client());
    let at = *cluster.addresses().first().context("an API server needs an address")?;
    std::fs::create_dir_all(host.path(KUBECONFIGS)).context("directory of kubeconfigs")?;
    let names: Vec<String> = (1..=size.agents).map(|n| format!("n{n:04}")).collect();
    world::each(&names, |node| {
        let name = format!("mesh-agent-{node}");
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": SYSTEM, "name": name, "labels": {"app.kubernetes.io/name": "mesh-agent"}},
            "spec": {
                "nodeName": node, "hostNetwork": true, "serviceAccountName": "mesh-agent",
                "containers": [{"name": "mesh-agent", "image": "lab"}],
            },
        });
        world::create(&client, &format!("/api/v1/namespaces/{SYSTEM}/pods"), &pod)?;
        let token = cluster.token(SYSTEM, "mesh-agent", Some(&name))?;
        host.write_secret(&format!("{KUBECONFIGS}/{node}"), cluster.kubeconfig(&token, at)?.as_bytes())
    })
}
