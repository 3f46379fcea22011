"Stable Growing Recurrence: a GPT that grows by re-applying its core while it trains.\n\n    stem -> core, core, ... -> tail      1 pass, then 2, then 3 as the run proceeds\n\nOne run trains for a fixed wall clock, averages and quantizes the weights to int6, compresses them\nso that code + model fit 16,000,000 bytes, reloads the file, and scores the validation text in bits\nper byte: plain, with sliding windows, and with score-first test-time training.\n\n    torchrun --standalone --nproc_per_node=8 train_gpt.py        one node of 8 GPUs, 600 s\n    python train_gpt.py                                          one process, GPU or CPU\n    python train_gpt.py --evaluate logs/RUN.int6.xz              score an artifact again\n    python train_gpt.py --run-id RUN --resume                    go on from RUN's last checkpoint\n\nEvery setting is a flag (--residual-scale-init) and an environment variable (RESIDUAL_SCALE_INIT);\nthe flag wins. Exit codes: 0 done, 2 a mistake in what was given, 3 diverged, 4 stopped by a signal\nwith a checkpoint, 5 stopped by a signal but exported and scored.\n"
from __future__ import annotations
import argparse as y,bisect as V,copy as be,hashlib as z,io as v,json as ac,lzma as t,math as l,os as s,platform as ai,shutil as bG,signal as g,struct as aq,sys as c,tempfile as bH,time as h
from collections import deque as bh
from concurrent.futures import ThreadPoolExecutor as T
from contextlib import suppress as ar
from dataclasses import dataclass as Z,field as bo,fields as u,replace as bD
from datetime import timedelta as bI
from functools import cache as F,partial as af
from itertools import pairwise as I
from pathlib import Path as o
from typing import NamedTuple as E
from urllib.parse import quote as bB
import numpy as k,sentencepiece as ao,torch as d,torch.distributed as n,torch.nn.functional as f
from torch import Tensor as b,nn as e
aM,aN,aL=20240520,1,256
aG=3.4445,-4.775,2.0315
aD=.85
av=.999,.9995,.9999,.99999,1.
i,aC=31,127
aB,D=512,7168
aV=[{'id':t.FILTER_LZMA2,'preset':6,'dict_size':4096,'lc':0,'lp':0,'pb':0}]
M=b'SGR1'
aF=1<<30
aO=65536
q='mlp_up_bank','mlp_down_bank','qo_bank','kv_bank'
aR='tok_emb','bigram_table','ve_table'
aH='bigram_proj','ve_proj'
aI=1e-06
aw=bI(seconds=300)
aA,ay,N,az=2,3,4,5
class r(ValueError):0
def m(a,text):
	if not a:raise r(text)
def a(default,rule,text,group=''):return bo(default=default,metadata={'rule':rule,'text':text,'group':group})
@Z(frozen=True)
class x:
	run_id:str|None=a(None,'','name of the log and artifact; none: time and seed','run');seed:int=a(1337,'>=0','seed of the weights and of the data order');output_dir:str=a('logs','','folder of the log, the artifact and the checkpoints');iterations:int|None=a(None,'>=0','steps after which training ends; none: no limit');max_wallclock_seconds:float|None=a(6e2,'>0','seconds of training; none: no limit');reserve_seconds:float=a(.0,'>=0','seconds of them kept for what follows training');warmup_steps:int=a(20,'>=0','steps before the clock starts, undone before it does');train_log_every:int=a(50,'>=1','steps between lines of the log');val_loss_every:int|None=a(None,'>=1','steps between validations; none: at the end');checkpoint_seconds:float|None=a(None,'>0','seconds between checkpoints; none: off');resume:bool=a(False,'','go on from the newest checkpoint of run_id, if there is one');on_signal:str=a('export','export|checkpoint','after SIGTERM or SIGINT; then the end');dtype:str=a('auto','auto|bfloat16|float32','arithmetic; auto: bfloat16 on a GPU only');compile:str=a('auto','auto|on|off','torch.compile; auto: on a GPU only');attention:str=a('auto','auto|fa3|sdpa|plain','kernel; auto: fa3 if installed, or sdpa');data_path:str=a('./data/datasets/fineweb10B_sp1024','','folder of the shards','data');tokenizer_path:str=a('./data/tokenizers/fineweb_1024_bpe.model','','SentencePiece model');train_batch_tokens:int=a(786432,'>=1','tokens of a step; default: 98,304 a process');micro_batch_tokens:int=a(98304,'>=1','most tokens that a rank takes at once');shuffle:bool=a(True,'','read the windows of all shards in a seeded random order');vocab_size:int=a(1024,'8..65536','pieces of the tokenizer','model');train_seq_len:int=a(2048,'8..1048576','tokens of a window, in training and evaluation');num_layers:int=a(11,'1..256','unique layers');model_dim:int=a(512,'8..16384','width of the residual stream');num_heads:int=a(8,'1..256','query heads');num_kv_heads:int=a(4,'1..256','key and value heads');mlp_mult:float=a(3.,'0.01..64','MLP width over model width');rope_base:float=a(1e4,'>1','RoPE base at a length of 1,024 tokens');rope_dims:int=a(16,'>=0','dims of each head that RoPE turns');qk_gain_init:float=a(1.5,'','start of the gain of each query head');xsa_last_n:int=a(4,'>=0',"last layers with XSA (never the core's)");bigram_vocab_size:int=a(512,'0..1048576','rows of BigramHash; 0: off');bigram_dim:int=a(32,'1..16384',"width of BigramHash's rows");ve_dim:int=a(128,'1..16384','width of the value embedding table');ve_layers:str=a('9,10','','layers with value embeddings; none: off');logit_softcap:float=a(3e1,'>0','bound of the logits');tied_embed_init_std:float=a(.005,'>0','std of the embedding at the start');core_start:int=a(4,'>=0','first layer of the core','recurrence');core_end:int=a(7,'>=1',"layer after the core's last");passes_schedule:str=a('0.0:1,0.626:2,0.813:3','','start:passes,...; starts are fractions (a point) or steps');num_passes:int|None=a(None,'1..64',"fixed passes in training; none: the schedule's");eval_passes:int|None=a(None,'1..64',"passes in evaluation; none: the schedule's last");residual_scale_init:float=a(.5,'','start of the scale of each pass after the first');feedback_mode:str=a('diagonal','none|identity|diagonal',"off, U(V'h), or d * U(V'h)");feedback_rank:int=a(2,'1..1024','columns of U and V');per_pass_feedback:bool=a(False,'','a d of its own for each pass');jacobian_proxy_weight:float=a(.01,'>=0','weight of the proxy in the loss');interpass_rmsnorm:bool=a(False,'','rms_norm of h before each pass after the first');matrix_lr:float=a(.025,'>=0',"Muon's learning rate",'optimization');tied_embed_lr:float=a(.035,'>=0',"AdamW's learning rate of the tables");scalar_lr:float=a(.025,'>=0',"AdamW's learning rate of all else");muon_momentum:float=a(.99,'0..1',"Muon's momentum");muon_momentum_warmup_start:float=a(.92,'0..1',"Muon's first momentum");muon_momentum_warmup_frac:float=a(.237,'0..1','its rise (1,500 of 6,330 steps)');muon_momentum_frac:float=a(.0158,'>0','longest average, of the run (0.99 in 6,330 steps)');muon_row_norm:bool=a(True,'',"level the rows of Muon's gradient first (MuonEq-R)");muon_backend_steps:int=a(5,'1..20','Newton-Schulz iterations');muon_wd:float=a(.04,'>=0','decoupled weight decay of the banks');adam_wd:float=a(.04,'>=0','decoupled weight decay of tables and projections');beta1:float=a(.9,'0..0.9999',"AdamW's first decay");beta2:float=a(.95,'0..0.9999',"AdamW's second decay");adam_eps:float=a(1e-08,'>0',"AdamW's epsilon");grad_clip_norm:float=a(.3,'>0',"bound of the global gradient's norm");warmdown_frac:float=a(.55,'0..1','last fraction, in which the lr falls to 0');weight_average:str=a('ema','none|ema|swa|ema_swa','weights to export','averaging, QAT');ema_frac:float=a(.0526,'1e-6..1',"EMA's horizon (decay 0.997 in 6,330 steps)");swa_frac:float=a(.0079,'0..1',"fraction between SWA's samples (50 of 6,330 steps)");swa_lr_scale:float=a(.2,'0..1','SWA starts below this lr scale');late_qat_threshold:float=a(.15,'0..1','QAT starts below this lr scale; 0: never');qat_scope:str=a('core','core|all','layers under QAT');evaluate:str|None=a(None,'','score this artifact instead of training','evaluation');artifact_limit_bytes:int=a(16000000,'>=1','most bytes of code and model together');eval_wallclock_seconds:float|None=a(6e2,'>0','TTT epochs drop to end within this');eval_stride:int=a(64,'>=1','tokens that a sliding window scores');eval_batch_seqs:int=a(64,'>=1','windows that a rank scores at once');sliding_eval:bool=a(True,'','score with sliding windows');ttt_enabled:bool=a(True,'','score with score-first test-time training');ttt_lr:float=a(.002,'>=0',"SGD's learning rate for the first chunk");ttt_momentum:float=a(.9,'0..1',"SGD's momentum");ttt_epochs:int=a(3,'>=0','epochs over each chunk once it is scored');ttt_chunk_tokens:int=a(32768,'>=1','tokens of a chunk');ttt_batch_seqs:int=a(32,'>=1','most sequences of an SGD step, all ranks together');ttt_grad_clip:float=a(1.,'>0',"bound of the gradient's norm");token_losses:str|None=a(None,'',"write the last evaluation's losses here (.npy, nats)")
	def __post_init__(a):e=[(n.name,getattr(a,n.name),n.metadata['rule'])for n in u(a)];d=[f"{o}={j} must be {h}"for(o,j,h)in e if not bv(j,h)];b=[o for(o,j,q)in e if isinstance(j,float)and not l.isfinite(j)];d+=[f"{c} must be finite"for c in b];d=d or[', '.join(f"{c}={getattr(a,c)}"for c in f.split())+f": {g}"for(i,f,g)in a.rules()if not i];m(not d,'\n'.join(d))
	def rules(a):
		o,h,d=a.num_layers,a.train_seq_len,a.model_dim//a.num_heads;c,j,e=a.max_wallclock_seconds,a.ve_layer_ids,a.batch_seqs*h;p=(a.iterations,c)!=(None,None);yield(p,'iterations max_wallclock_seconds','training would never end, set one');r=c is None or c>a.reserve_seconds;yield(r,'reserve_seconds max_wallclock_seconds','no time is left, lower the first');n=a.run_id is not None or not a.resume;yield(n,'resume run_id','name the run that is to go on');q=f"no multiple of the window of {h} tokens: use {max(e,h)}";yield(0<e==a.train_batch_tokens,'train_batch_tokens',q);yield(a.micro_batch_tokens>=h,'micro_batch_tokens',f"raise it to a window of {h}");m=a.core_start<a.core_end<=o;yield(m,'core_start core_end',f"the core must be a part of the {o} layers");yield(a.mlp_dim>=1,'mlp_mult model_dim','no MLP is left, raise mlp_mult');k=a.model_dim%a.num_heads==0==a.num_heads%a.num_kv_heads;yield(k,'model_dim num_heads num_kv_heads','each must divide the one before');l=a.rope_dims%2==0 and a.rope_dims<=d;yield(l,'rope_dims',f"must be even and at most the head dim {d}");yield(a.bigram_vocab_size!=1,'bigram_vocab_size','use 0 (off) or at least 2');yield(a.eval_stride<=h,'eval_stride',f"would skip tokens, use at most {h}");b=len(set(j))==len(j)and all(0<=i<o for i in j);yield(b,'ve_layers',f"write different layers of 0..{o-1} such as 9,10, or none");f=0
		try:f=a.max_passes
		except ValueError:g='starts from 0 that rise, all steps or all fractions below 1, and 1..64 passes';yield(False,'passes_schedule',f"write {g}, such as 0.0:1,0.626:2 or 0:1,4500:2")
		yield(f!=1 or a.eval_passes in(None,1),'eval_passes','training has one pass')
	@property
	def batch_seqs(a):return a.train_batch_tokens//a.train_seq_len
	@property
	def mlp_dim(a):return int(a.mlp_mult*a.model_dim)
	@property
	def ve_layer_ids(a):d=[]if a.ve_layers in('','none')else a.ve_layers.split(',');return tuple(int(e)if e.strip().isdecimal()else-1 for e in d)
	@property
	def growth(a):return bz(f"0:{a.num_passes}"if a.num_passes else a.passes_schedule)
	@property
	def max_passes(a):return max(m for(q,m)in a.growth)
	@property
	def passes_in_evaluation(a):return a.eval_passes or a.growth[-1][1]
	def architecture(a):f=[n.name for n in u(a)];v=f[f.index('vocab_size'):f.index('matrix_lr')];return{c:getattr(a,c)for c in v}
def bv(value,rule):
	if'|'in rule:return value in rule.split('|')
	c,q,j=rule.lstrip('>=').partition('..')
	if value is None or not c:return True
	b=rule[0]=='>'and rule[1]!='=';a=value>float(c)if b else value>=float(c);return a and value<=float(j or'inf')
@F
def bz(text):
	d=[k.split(':')for k in text.split(',')];c=tuple((float(b)if'.'in b else int(b),int(m))for(b,m)in d);e=[f for(f,q)in c];a=e[0]==0 and all(j<i for(j,i)in I(e));g={type(b)for b in e[1:]}in({int},{float},set());h=isinstance(e[-1],int)or e[-1]<1
	if not(a and g and h and all(1<=m<=64 for(q,m)in c)):raise ValueError(text)
	return c
def bA(kind,text):
	a,b=kind.removesuffix(' | None'),text.strip().lower()
	if a!=kind and b in('','none'):return
	if a=='bool':return{'0':False,'false':False,'1':True,'true':True}[b]
	return{'int':int,'float':float,'str':str}[a](text)
def aY():
	f,q,w=__doc__.partition('\n\n');i='train_gpt.py [--SETTING VALUE ...]';a=y.ArgumentParser('train_gpt.py',i,f,w,allow_abbrev=False);a.formatter_class=y.RawDescriptionHelpFormatter;c=a.add_argument
	for n in u(x):g,h,b=(n.metadata[e]for e in('text','rule','group'));c=a.add_argument_group(b).add_argument if b else c;o=str(n.type).removesuffix(' | None');d={'metavar':o.upper()};d={'action':y.BooleanOptionalAction}if o=='bool'else d;g=f"{g} [{n.name.upper()}={n.default}] {h}";c('--'+n.name.replace('_','-'),help=g,default=y.SUPPRESS,**d)
	return a
def ak(env,p):
	v,q=aY().parse_known_args(p);f,e,g=v.__dict__,{},{};d=[f"unknown argument {j}: see --help"for j in q]
	for n in u(x):
		c,k=n.name,n.name.upper();g[c]='flag'if c in f else'env'if k in env else'default';a=f.get(c,env.get(k))
		try:
			if g[c]!='default':e[c]=a if isinstance(a,bool)else bA(str(n.type),a)
		except(ValueError,KeyError):o='bool (0, 1, false, true)'if n.type=='bool'else n.type;d.append(f"{c}={a} ({g[c]}) is no {o}")
	if g['train_batch_tokens']=='default':h=e.get('train_seq_len',2048);l=98304*int(env.get('WORLD_SIZE',1));e['train_batch_tokens']=max(1,l//max(1,h))*h
	try:b=x(**e)
	except r as i:d.append(str(i))
	m(not d,'\n'.join(d));return b,g
@Z(frozen=True)
class aK:
	rank:int;world_size:int;device:d.device;dtype:d.dtype
	@classmethod
	def start(h,hp):
		e,f=int(s.environ.get('RANK',0)),int(s.environ.get('WORLD_SIZE',1));i,a,k=d.device('cpu'),'gloo',d.float32
		if d.cuda.is_available():c,b=int(s.environ.get('LOCAL_RANK',0)),d.cuda.device_count();g=f"nproc_per_node: process {c} has no GPU of its own, {b} are visible";m(c<b,f"{g}: start at most {b} processes a node");i,a=d.device('cuda',c),'cpu:gloo,cuda:nccl';d.cuda.set_device(i);k=d.bfloat16
		if f>1:n.init_process_group(a,timeout=aw)
		k=k if hp.dtype=='auto'else getattr(d,hp.dtype);return h(e,f,i,k)
	@property
	def is_main(a):return a.rank==0
	def sum_(a,x):
		if a.world_size>1:n.all_reduce(x)
		return x
	def barrier(a):a.sum_(d.zeros(1,device=a.device)).item()
	def from_main(a,value):
		b=[value]
		if a.world_size>1:n.broadcast_object_list(b,src=0,device=d.device('cpu'))
		return b[0]
	def share(a,count):return slice(*(e*count//a.world_size for e in(a.rank,a.rank+1)))
def ad(value):
	if isinstance(value,(tuple,list)):return','.join(map(ad,value))or'none'
	if isinstance(value,float):return f"{value:.6g}"
	return bB(str(value),safe='!"#$&\'()*+,-./:;<=>?@[]^_`{|}~')or'none'
class R:
	def __init__(a,path,resume=False):
		a.path,a.resume,a.bar,a.since=path,resume,False,h.perf_counter();a.outputs,a.early=[c.stdout],v.StringIO()
		for b in(path,path.with_suffix('.checkpoints'))if path else():g=f"run_id: {b} exists and is never overwritten: choose another run_id";m(resume or not b.exists(),f"{g}, or --resume")
	def open(a):
		if a.path is None:return
		try:a.path.parent.mkdir(parents=True,exist_ok=True);b=a.path.open('a'if a.resume else'x',encoding='utf-8');b.write('\n'*(b.tell()>0)+a.early.getvalue())
		except OSError as i:g=f"output_dir: cannot write {a.path} ({i.strerror})";raise r(f"{g}: choose another folder")from None
		a.outputs.append(b)
	def event(a,name='',/,**b):
		if a.path is None:return
		d=[name]if name else[];j=' '.join(d+[f"{e}:{ad(k)}"for(e,k)in b.items()]);a.early.write(j+'\n')
		for h in list(a.outputs):
			f='\r\x1b[K'*(a.bar and h is c.stdout)
			try:print(f+j,file=h,flush=True)
			except OSError as i:
				a.outputs.remove(h);a.outputs=a.outputs or[c.stderr]
				with ar(OSError):g=f"warning: {h.name} ends here ({i.strerror})";print(g,file=c.stderr,flush=True)
		a.bar=False
	def progress(a,b,e):
		if a.path is not None and c.stdout.isatty():
			d='#'*round(30*b)
			with ar(OSError):print(f"\r[{d:.<30}] {b:4.0%} {e}[K",end='',flush=True)
			a.bar=True
	def phase(a,name):e=h.perf_counter();a.event('phase',name=name,seconds=f"{e-a.since:.3f}");a.since=e
def bp(b,split):a=sorted(b.glob(f"fineweb_{split}_*.bin"));c='run data/download_fineweb.py or data/prepare_text.py, or set DATA_PATH';m(bool(a),f"data_path={b} holds no fineweb_{split}_*.bin: {c}");return a
def H(path):
	def a(i,text):m(i,f"data shard {path} {text}: download or prepare it again")
	a(path.is_file(),'is missing');e,c=path.stat().st_size,4*aL;a(e>=c,f"has {e} bytes, less than its header");*b,j=k.fromfile(path,dtype='<i4',count=3).tolist();d=[aM,aN];a(b==d,f"starts with {b}, not with magic and version {d}");f=(e-c)/2;a(j==f,f"counts {j} tokens in its header and holds {f:g}");a(j>0,'holds no tokens');return k.memmap(path,dtype='<u2',mode='r',offset=c,shape=(j,))
def bg(a):
	q=z.sha256()
	for h in a:l=H(h);q.update(f"{h.name}:{len(l)}:".encode());q.update(l[:4096].tobytes()+l[-4096:].tobytes())
	return q.hexdigest()[:16]
def bb(a,vocab_size):
	for h in a:b=int(H(h).max());g=f"data shard {h} holds token {b}, outside vocab_size={vocab_size}";m(b<vocab_size,f"{g}: use the tokenizer that it was made with")
def br(path,vocab_size):
	c=f"tokenizer_path={path}";m(path.is_file(),f"{c} is missing: set TOKENIZER_PATH to the model of the shards");j=ao.SentencePieceProcessor()
	try:j.LoadFromSerializedProto(path.read_bytes())
	except(RuntimeError,OSError):raise r(f"{c} is no SentencePiece model: set TOKENIZER_PATH")from None
	a=j.vocab_size();g=f"{c} has {a} pieces, the model vocab_size={vocab_size}: use another tokenizer";m(a==vocab_size,f"{g}, or train a model with VOCAB_SIZE={a}");b=not j.IsUnknown(j.PieceToId('▁'));m(b,f"{c} has no piece for the space, so that bytes would be miscounted");return j
class aS:
	def __init__(a,j,device):
		c=[]
		for i in range(j.vocab_size()):e=j.IdToPiece(i);b=not(j.IsControl(i)or j.IsUnknown(i)or j.IsUnused(i));l=1 if j.IsByte(i)else len(e.removeprefix('▁').encode());c.append([l*b,e.startswith('▁')*b,b])
		g=d.tensor(c,dtype=d.int32,device=device);a.length,a.space,a.inner=g.T.contiguous().unbind()
	def of(a,b,t):return a.length[t]+a.space[t]*a.inner[b]
def ba(j,table,tokens):
	a=tokens[:200000].astype(k.int64)
	while len(a)>1 and j.IsByte(int(a[-1])):a=a[:-1]
	e=k.flatnonzero(table.inner.cpu().numpy()[a]==0).tolist();c=0
	for(f,p)in I([-1,*e,len(a)]):g=j.Decode(a[f+1:p].tolist());c+=len(g.removeprefix(' 'if f>=0 else'').encode())
	h=d.from_numpy(a).to(table.length.device);b=len(j.Decode(a[:1].tolist()).encode());b+=int(table.of(h[:-1],h[1:]).sum());g=f"tokenizer_path: its pieces count {b} bytes for a text of {c} bytes";m(b==c,f"{g}: use the tokenizer of the shards, with byte fallback")
class au:
	def __init__(a,shards,b,e):a.shards,a.hp,a.runtime=shards,b,e;h,a.share=b.train_seq_len,e.share(b.batch_seqs);a.shape=a.share.stop-a.share.start,h+1;p=[max(0,len(l)//h-1)for l in shards];a.first_window=k.cumsum([0,*p]);a.epoch_windows,a.epoch=int(a.first_window[-1]),-1;g=f"data_path: no training shard holds two windows of train_seq_len={h} tokens";m(a.epoch_windows>0,f"{g}: prepare more text or lower train_seq_len");a.pool=T(1,thread_name_prefix='loader');a.pending={}
	def start_epoch(a,g):
		b=k.random.default_rng([a.hp.seed,g]);a.epoch,a.phase,a.order=g,0,k.arange(a.epoch_windows)
		if a.hp.shuffle:a.phase=int(b.integers(a.hp.train_seq_len));b.shuffle(a.order)
	def window(a,c):
		g,o=divmod(c,a.epoch_windows)
		if g!=a.epoch:a.start_epoch(g)
		b,h=int(a.order[o]),a.hp.train_seq_len;k=V.bisect_right(a.first_window,b)-1;f=a.phase+(b-int(a.first_window[k]))*h;return a.shards[k][f:f+h+1]
	def gather(a,step):
		h=a.runtime.device.type=='cuda';n=d.empty(a.shape,dtype=d.int32,pin_memory=h)
		for(s,i)in zip(n.numpy(),range(a.share.start,a.share.stop),strict=True):s[:]=a.window(step*a.hp.batch_seqs+i)
		return n
	def batch(a,step):
		for b in(step,step+1,step+2):
			if b not in a.pending:a.pending[b]=a.pool.submit(a.gather,b)
		return a.pending.pop(step).result().to(a.runtime.device,non_blocking=True)
class aE(E):qkv:b;out:b;mlp_up:b;mlp_down:b;resid_mix:b;q_gain:b;xsa:bool;value:b|None=None;skip:tuple[b,b]|None=None
def p(x):return f.rms_norm(x,(x.size(-1),),eps=aI)
def bE(b):l,a=b.train_seq_len,b.rope_dims;f=max(1.,l/1024)**(a/max(1,a-2));e=(b.rope_base*f)**-(d.arange(0,a,2).float()/max(1,a));c=d.outer(d.arange(l).float(),e);return c.cos(),c.sin()
def al(x,n):a,c=(g[:,None].to(x.dtype)for g in n);b=a.size(-1);j,i,w=x.split([b,b,x.size(-1)-2*b],dim=-1);return d.cat([j*a-i*c,i*a+j*c,w],dim=-1)
def bk(a,j):a=a.unflatten(2,(j.size(2),-1));j=f.normalize(j,dim=-1).unsqueeze(3);return(a-(a*j).sum(-1,keepdim=True)*j).flatten(2,3)
def attention(x,e,n,i):h,l=e.out.size(0),e.q_gain.numel();o=(e.qkv.size(0)-h)//2;m,k,j=f.linear(x,e.qkv).split([h,o,o],dim=-1);j=j if e.value is None else j+e.value;m,k,j=(g.unflatten(-1,(-1,h//l))for g in(m,k,j));m,k=al(p(m),n),al(p(k),n);a=i(m*e.q_gain[:,None],k,j);a=bk(a,j)if e.xsa else a;return f.linear(a.flatten(2),e.out)
def bt(x,e):return f.linear(f.leaky_relu(f.linear(x,e.mlp_up),.5).square(),e.mlp_down)
def block(x,layer,x0,rope,attend):x=x if layer.skip is None else x+layer.skip[1]*layer.skip[0];x=layer.resid_mix[0]*x+layer.resid_mix[1]*x0;x=x+attention(p(x),layer,rope,attend);return x+bt(p(x),layer)
def ap(x,layers,*inputs,block=block):return[(x:=block(x,e,*inputs))for e in layers]
def aX(h,a):c=d.bitwise_xor(36313*h[:,1:],27191*h[:,:-1])%(a-1);return f.pad(c,(1,0),value=a-1)
def bi(ids,table,bigram,gate,dtype):
	a=f.embedding(ids,table.to(dtype))
	if bigram:c,d,b=(g.to(dtype)for g in bigram);a=a+b*f.linear(f.embedding(aX(ids,len(c)),c),d)
	a,i=p(a),gate.sigmoid().to(dtype);return(1-i)*a+i*f.pad(a,(0,0,1,0))[:,:-1]
def token_losses(x,targets,table,softcap):a=f.linear(p(x),table.to(x.dtype)).float();a=softcap*d.tanh(a/softcap);l=f.cross_entropy(a.flatten(0,1),targets.flatten().long(),reduction='none');return l.view_as(targets)
def ah(q,k,v):k,v=(g.float().repeat_interleave(q.size(2)//k.size(2),dim=2)for g in(k,v));b=d.einsum('bthe,bshe->bhts',q.float(),k)/l.sqrt(q.size(-1));a=d.ones(b.shape[-2:],dtype=d.bool,device=q.device).triu(1);c=b.masked_fill(a,-l.inf).softmax(-1);return d.einsum('bhts,bshe->bthe',c,v).to(q.dtype)
def an(q,k,v):
	if q.device.type=='cpu':k,v=(g.repeat_interleave(q.size(2)//g.size(2),dim=2)for g in(k,v))
	q,k,v=(g.transpose(1,2)for g in(q,k,v));b=q.size(1)!=k.size(1);a=f.scaled_dot_product_attention(q,k,v,is_causal=True,enable_gqa=b);return a.transpose(1,2)
def bm(q,k,v):from flash_attn_interface import flash_attn_func as b;a=b(q,k,v,causal=True);return a[0]if isinstance(a,tuple)else a
def bc(b,e):
	j={'fa3':bm,'sdpa_cudnn':an,'sdpa':an};k={'device':e.device,'dtype':e.dtype,'requires_grad':True};l,h=(b.num_heads,b.num_kv_heads,b.num_kv_heads),e.device.type=='cuda';g=b.model_dim//b.num_heads
	for(c,i)in(j|{'plain':ah}).items():
		f=c=='sdpa_cudnn'
		if b.attention not in('auto',c.split('_')[0])or f and not h:continue
		for a in('cudnn','flash','mem_efficient','math'):getattr(d.backends.cuda,f"enable_{a}_sdp")(f==(a=='cudnn'))
		n=h and c=='fa3'and b.compile!='off';m=d.compile(i,fullgraph=True)if n else i
		try:m(*(d.ones(1,256,o,g,**k)for o in l)).sum().backward()
		except Exception:continue
		return c,i
	raise r(f"attention={b.attention} does not run here: use auto")
class aP(E):jacobian_proxy:b;growth:b;update:b;feedback:b
def B(x):return d.linalg.vector_norm(x,dim=(1,2),dtype=d.float32)
def bf(h,U,V,d):c=h@V.to(h.dtype)@U.to(h.dtype).T;return c if d is None else d.to(h.dtype)*c
def aW(h,c,core_output,scale):
	a=core_output
	if scale is not None:j=h if c is None else h+c;a=h+scale.to(h.dtype)*(core_output-j)
	e=B(h)+1e-06;i=B(a-h)/e;b=d.zeros_like(e)if c is None else B(c)/e;g=d.stack([B(a)/e,i,b]);return a,f.relu(i-1).square(),g.mean(1).detach()
class aJ(e.Module):
	def __init__(a,b):
		super().__init__();f=b.max_passes-1;a.mode=b.feedback_mode if f else'none';a.interpass_rmsnorm=b.interpass_rmsnorm;a.residual_scale=e.Parameter(d.full((f,),b.residual_scale_init))
		if a.mode!='none':a.U=e.Parameter(d.zeros(b.model_dim,b.feedback_rank));a.V=e.Parameter(d.randn_like(a.U)/l.sqrt(b.model_dim))
		if a.mode=='diagonal':c=f if b.per_pass_feedback else 1;a.d=e.Parameter(d.ones(c,b.model_dim))
	def forward(a,e,core,num_passes,f):
		i,g,c,b=[],[],None,None
		for k in range(num_passes):
			if k>0:
				e=p(e)if a.interpass_rmsnorm else e;b=a.residual_scale[min(k,len(a.residual_scale))-1]
				if a.mode!='none':j=a.d[min(k,len(a.d))-1]if a.mode=='diagonal'else None;c=f(bf)(e,a.U,a.V,j)
			h=core(e if c is None else e+c);e,m,l=f(aW)(e,c,h,b);i.append(m);g.append(l)
		return e,aP(d.stack(i).sum(0),*d.stack(g).unbind(1))
@F
def Y(function):return d.compile(function,dynamic=False,fullgraph=True)
class Q(e.Module):
	def __init__(a,b,dtype=d.float32,i=ah,k=False):
		super().__init__();a.hp,a.dtype,a.attend=b,dtype,i;a.region=Y if k else lambda m:m;l,h,o=b.num_layers,b.model_dim,b.model_dim//b.num_heads*b.num_kv_heads;n={'qo_bank':(2*l,h,h),'kv_bank':(2*l,o,h),'mlp_up_bank':(l,b.mlp_dim,h),'mlp_down_bank':(l,h,b.mlp_dim),'tok_emb':(b.vocab_size,h),'smear_gate':(h,),'resid_mix':(l,2,h),'attn_scale':(l,h),'mlp_scale':(l,h),'q_gain':(l,b.num_heads),'skip_weight':(min(b.core_start,l-b.core_end),h)}
		if b.bigram_vocab_size:n|={'bigram_table':(b.bigram_vocab_size,b.bigram_dim)};n|={'bigram_proj':(h,b.bigram_dim),'bigram_scale':()}
		if b.ve_layer_ids:n|={'ve_table':(b.vocab_size,b.ve_dim),'ve_proj':(o,b.ve_dim)};n|={'ve_scale':(),'ve_layer_scale':(len(b.ve_layer_ids),)}
		for(c,g)in n.items():a.register_parameter(c,e.Parameter(d.empty(g)))
		a.recurrence=aJ(b);q,f=d.arange(1,l+1).float().rsqrt(),('cos','sin','ln_scale')
		for(c,j)in zip(f,(*bE(b),q),strict=True):a.register_buffer(c,j,persistent=False)
		a.initialize()
	@d.no_grad()
	def initialize(a):
		b,l=a.hp,a.hp.num_layers
		for c in(*a.qo_bank[:l],*a.kv_bank,*a.mlp_up_bank):e.init.orthogonal_(c)
		for f in(a.qo_bank[l:],a.mlp_down_bank,a.smear_gate,a.resid_mix):f.zero_()
		for d in(a.attn_scale,a.mlp_scale,a.skip_weight,a.resid_mix[:,0]):d.fill_(1.)
		a.q_gain.fill_(b.qk_gain_init);e.init.normal_(a.tok_emb,std=b.tied_embed_init_std)
		if b.bigram_vocab_size:a.bigram_table.zero_();e.init.normal_(a.bigram_proj,std=b.bigram_dim**-.5);a.bigram_scale.fill_(.05)
		if b.ve_layer_ids:e.init.normal_(a.ve_table,std=.01);a.ve_proj.zero_();a.ve_scale.fill_(.1);a.ve_layer_scale.fill_(1.)
	def layers(a,r):
		b,l=a.hp,a.hp.num_layers;f,p=(b.core_start,b.core_end)if b.qat_scope=='core'else(0,l)
		def o(h):
			e=h.unflatten(0,(-1,l))
			if r is None:return e
			n=a.region(bn)(e[:,f:p],r);return d.cat([e[:,:f],n,e[:,p:]],dim=1)
		(m,v),(k,j)=o(a.qo_bank),o(a.kv_bank);[w],[u]=o(a.mlp_up_bank),o(a.mlp_down_bank);q=a.ln_scale[:,None,None];t=q*d.cat([m,k,j],dim=1),a.attn_scale[...,None]*v;t+=q*w,a.mlp_scale[...,None]*u;c=[g.to(a.dtype).unbind()for g in(*t,a.resid_mix,a.q_gain)];x=[i>=l-b.xsa_last_n and not b.core_start<=i<b.core_end for i in range(l)];return[aE(*s)for s in zip(*c,x,strict=True)]
	def value_embeddings(a,h):
		if not a.hp.ve_layer_ids:return{}
		g,d=a.ve_table.to(a.dtype),a.ve_proj.to(a.dtype);k=f.linear(f.embedding(h,g),d);c=(a.ve_scale*a.ve_layer_scale).to(a.dtype).unbind();return{i:b*k for(i,b)in zip(a.hp.ve_layer_ids,c,strict=True)}
	def forward(a,h,o,num_passes,r=None,score_last=None):
		b,l=a.hp,a.hp.num_layers;j,n=a.layers(r),(a.cos,a.sin)
		for(i,k)in a.value_embeddings(h).items():j[i]=j[i]._replace(value=k)
		f=('bigram_table','bigram_proj','bigram_scale')if b.bigram_vocab_size else();v=tuple(getattr(a,c)for c in f);s=a.region(bi)(h,a.tok_emb,v,a.smear_gate,a.dtype)
		def run(x,start,end):
			p=x,j[start:end],s,n,a.attend
			if not d.is_grad_enabled():return[x,*ap(*p,block=a.region(block))]
			u=(g for e in p[1]for g in(e.value,*(e.skip or())[:1]))
			for g in(x,s,*(g for g in u if g is not None)):d._dynamo.maybe_mark_dynamic(g,0)
			return[x,*a.region(ap)(*p)]
		t=run(s,0,b.core_start);w=lambda x:run(x,b.core_start,b.core_end)[-1];x,q=a.recurrence(t[-1],w,num_passes,a.region);A=zip(t[:0:-1],a.skip_weight.to(a.dtype).unbind(),strict=False)
		for(i,z)in enumerate(A,b.core_end):j[i]=j[i]._replace(skip=z)
		x=run(x,b.core_end,l)[-1];m,y=slice(-(score_last or h.size(1)),None),a.region(token_losses);return y(x[:,m],o[:,m],a.tok_emb,b.logit_softcap),q
def by(name):v={'muon':q,'table':aR,'projection':aH};return next((b for(b,f)in v.items()if name in f),'scalar')
class P:
	ALIGNMENT=64
	def __init__(a,model,world_size=1):
		n=dict(model.named_parameters());a.shapes={c:p.shape for(c,p)in n.items()};a.places={};a.spans={};e=0
		for b in(*q,'table','projection','scalar'):
			f=e
			for c in[o for o in n if b in(o,by(o))]:
				a.places[c]=slice(e,e+n[c].numel());g=a.ALIGNMENT
				if b in q:g=world_size*l.lcm(n[c][0].numel(),a.ALIGNMENT)
				e+=l.ceil(n[c].numel()/g)*g
			a.spans[b]=slice(f,e)
		assert set(a.places)==set(n),'every parameter is optimized exactly once';a.data,a.grad=d.zeros(2,e,device=model.tok_emb.device).unbind()
		for(c,p)in n.items():p.data=a.data[a.places[c]].view(p.shape).copy_(p.data);p.grad=a.grad[a.places[c]].view(p.shape)
	def shard(a,j,h,e):c=j[a.spans[h]].view(-1,*a.shapes[h][1:]);return c.chunk(e.world_size)[e.rank]
	def named(a,j):return{c:j[a.places[c]].view(g)for(c,g)in a.shapes.items()}
	def whole(a,i):k=e.Parameter(a.data[i]);k.grad=a.grad[i];return k
def bu(g,k,dtype):
	j,i,c=aG;e=g.size(-2)>g.size(-1);a=(g.mT if e else g).to(dtype);a=a/(a.norm(dim=(-2,-1),keepdim=True)+1e-07)
	for q in range(k):b=a@a.mT;a=d.baddbmm(a,d.baddbmm(b,b,b,beta=i,alpha=c),a,beta=j)
	return a.mT if e else a
class S:
	def __init__(a,j,b,e):
		a.flat,a.hp,a.runtime=j,b,e;a.first,a.second=d.zeros_like(j.data),d.zeros_like(j.data);a.momentum={h:j.shard(a.first,h,e)for h in q};a.bank_grads={h:j.shard(j.grad,h,e)for h in q};a.rest=j.grad[j.spans['table'].start:];o={'table':(b.tied_embed_lr,b.adam_wd),'projection':(b.scalar_lr,b.adam_wd)};o['scalar']=b.scalar_lr,.0;n,f=[],{}
		for(c,(m,r))in o.items():i=j.spans[c];k,g=j.whole(i),d.zeros((),device=j.data.device);n.append({'params':[k],'base_lr':m,'weight_decay':r});l={'exp_avg':a.first[i],'exp_avg_sq':a.second[i]};f[k]=l|{'step':g}
		p,s=(b.beta1,b.beta2),b.adam_eps;a.adam=d.optim.AdamW(n,lr=.0,betas=p,eps=s,fused=True);a.adam.state.update(f)
	def reduce(a):
		j,e=a.flat,a.runtime
		if e.world_size>1:
			c=[]
			for h in q:a.bank_grads[h]=k=d.empty_like(a.momentum[h]);b=j.grad[j.spans[h]];c.append(n.reduce_scatter_tensor(k.view(-1),b,async_op=True))
			c.append(n.all_reduce(a.rest,async_op=True))
			for f in c:f.wait()
		g=d.stack([i.square().sum()for i in a.bank_grads.values()]).sum();return(e.sum_(g)+a.rest.square().sum()).sqrt()
	def gather(a,flat,bank):c=a.flat.shard(flat,bank,a.runtime).view(-1);return n.all_gather_into_tensor(flat[a.flat.spans[bank]],c,async_op=True)
	@d.no_grad()
	def step(a,i,lr_scale,e):
		c=[];g=(a.hp.grad_clip_norm/(i+1e-06)).clamp(max=1.)
		for h in q:
			a.update_rows(h,a.bank_grads[h]*g,lr_scale,e)
			if a.runtime.world_size>1:c.append(a.gather(a.flat.data,h))
		a.rest.mul_(g)
		for b in a.adam.param_groups:b['lr']=b['base_lr']*lr_scale
		a.adam.step()
		for f in c:f.wait()
	def update_rows(a,h,g,lr_scale,e):b,m=a.hp,a.hp.matrix_lr*lr_scale;c=a.flat.shard(a.flat.data,h,a.runtime);j=a.momentum[h].mul_(e).add_(g);k=d.bfloat16 if c.is_cuda else d.float32;g=g.add_(j,alpha=e);g=f.normalize(g,dim=-1,eps=1e-07)if b.muon_row_norm else g;i=bu(g,b.muon_backend_steps,k);n=l.sqrt(max(1.,c.size(-2)/c.size(-1)));c.mul_(1-m*b.muon_wd).add_(i,alpha=-m*n)
class aQ(E):num_passes:int;qat:bool;swa:bool;lr_scale:float;momentum:float
def J(b,step,progress):i=[o for(f,o)in b.growth if(progress if f%1 else step)>=f];c=min(1.,max(.0,1-progress)/max(b.warmdown_frac,1e-09));a=b.muon_momentum_warmup_frac;d=min(1.,progress/a)if a else 1.;e=(1-d)*b.muon_momentum_warmup_start+d*b.muon_momentum;g=1-progress/max(1,step)/b.muon_momentum_frac;e=min(e,max(aD,g));h,j=c<b.late_qat_threshold,c<b.swa_lr_scale;return aQ(i[-1],h,j,c,e)
def bF(b):e={f for(f,q)in b.growth};c=1-b.late_qat_threshold*b.warmdown_frac;k={f for f in e if not f%1};a=sorted({f for f in e if f%1}|{.0,1.,c});d=[*a[:-1],*((j+i)/2 for(j,i)in I(a))];return sorted({J(b,g,h)[:2]for g in k for h in d})
class aU:
	def __init__(a,b,c):a.hp,a.weights=b,c;a.ema=c.clone()if'ema'in b.weight_average else None;a.swa=d.zeros_like(c)if'swa'in b.weight_average else None;a.samples,a.last_progress,a.last_sample=0,.0,-1.
	def update(a,progress,swa):
		b,a.last_progress=progress-a.last_progress,progress
		if a.ema is not None:a.ema.lerp_(a.weights,-l.expm1(-b/a.hp.ema_frac))
		if a.swa is not None and swa and progress-a.last_sample>=a.hp.swa_frac:a.samples,a.last_sample=a.samples+1,progress;a.swa.lerp_(a.weights if a.ema is None else a.ema,1/a.samples)
	def result(a):
		if a.swa is not None and a.samples:return a.swa
		return a.weights if a.ema is None else a.ema
def K(e,a,floor):
	m=[(1-p)*(e.size(-1)-1)for p in av];k=e.abs().topk(min(e.size(-1),2+int(max(m)))).values;f=h=None
	for o in m:c,j=int(o),min(int(o)+1,k.size(-1)-1);g=d.lerp(k[...,c,None],k[...,j,None],o-c);b=d.maximum(g/a,floor).half().float();i=(A(e,b,a)*b-e).square().sum(-1,keepdim=True);n=i<(l.inf if h is None else h);f=b if f is None else d.where(n,b,f);h=i if h is None else d.minimum(i,h)
	return f
def A(e,b,a):return d.round(e/b).clamp(-a,a)
def bn(w,floor):
	with d.no_grad():b=K(w,i,floor);n=A(w,b,i)*b
	return n+(w-w.detach())
def j(c):return 2.**(-c/aB)
def L(name,shape):a=len(shape)==2 and shape.numel()>aO;return i if name in q else aC if a else 0
def ag(n):a=[(L(c,g),g)for(c,g)in n.items()];return sum(b.numel()+2*b[:-1].numel()if k else 2*b.numel()for(k,b)in a)
def bx(tensors,floor):
	f=[]
	for(c,e)in tensors.items():
		a=L(c,e.shape)
		if a:h=floor if a==i else j(D);b=K(e,a,d.tensor(h,device=e.device));f+=[b.half(),(A(e,b,a)+a).to(d.uint8)]
		else:f.append(e.half())
	return b''.join(g.cpu().numpy().tobytes()for g in f)
def bK(u,n):
	r,o={},v.BytesIO(u)
	def e(dtype,shape):f=k.frombuffer(o.read(l.prod(shape)*k.dtype(dtype).itemsize),dtype);return d.from_numpy(f.astype(k.float32)).view(shape)
	for(c,shape)in n.items():a=L(c,shape);b=e(k.float16,(*shape[:-1],1))if a else 1.;r[c]=(e(k.uint8 if a else k.float16,shape)-a)*b
	return r
def bd(hp,tensors,floor_index):a=ac.dumps(hp.architecture(),separators=(',',':')).encode();f=M+aq.pack('<I',len(a))+a;u=bx(tensors,j(floor_index));return t.compress(f+u,format=t.FORMAT_XZ,filters=aV)
def bj(tensors,floor):
	a=float(ag({o:e.shape for(o,e)in tensors.items()}))
	for e in(tensors[c]for c in q):b=K(e,i,d.tensor(floor,device=e.device));g=(A(e,b,i)+i).to(d.uint8).flatten();h=d.bincount(g,minlength=2*i+1).double()/e.numel();f=d.special.entr(h).sum().item()/l.log(2);a-=e.numel()*(1-1.01*f/8)
	return a
def aa(tensors,c):b=range(D+1);a=lambda i:bj(tensors,j(i))>c;return max(0,V.bisect_left(b,True,key=a)-1)
def bq(l,k,h,f):
	d,a=-1,D+1;b={k+g for g in(-64,-24,-8,0,8,24,64)}
	with T(s.cpu_count())as j:
		while a-d>1:
			b=sorted({min(max(i,d+1),a-1)for i in b})
			for(c,e)in zip(b,j.map(l,b),strict=True):f.event('export_probe',floor_index=c,artifact_bytes=e);d=max(d,c)if e<=h else d;a=min(a,c)if e>h else a
			b={d+(a-d)*i//8 for i in range(1,8)}
	return d if d>=0 else None
def aj(path):
	o=t.LZMADecompressor(t.FORMAT_XZ,memlimit=1<<26)
	def y(e,data=b''):
		s=o.decompress(data,e)
		while len(s)<e and not o.eof and not o.needs_input:s+=o.decompress(b'',e-len(s))
		m(len(s)==e,'it ends early');return s
	try:
		z,l=aq.unpack('<4sI',y(8,path.read_bytes()));v=z==M and l<1<<16;m(v,'it does not begin as an artifact does');a=ac.loads(y(l));f=x().architecture();m(isinstance(a,dict)and set(a)==set(f),'its header is another one');h=a['train_seq_len'];a|={'train_batch_tokens':h,'micro_batch_tokens':h,'eval_stride':1};b,q=ak({k.upper():str(j)for(k,j)in a.items()},[])
		with d.device('meta'):n={c:p.shape for(c,p)in Q(b).named_parameters()}
		e=ag(n);m(e<=aF,f"it claims {e} bytes of weights");u=y(e);w=b''if o.eof else o.decompress(b'',1);m(o.eof and not w and not o.unused_data,'it has too many bytes')
	except OSError as i:raise r(f"artifact {path} cannot be read: {i.strerror}")from None
	except(t.LZMAError,EOFError,ValueError,RecursionError)as i:g=f"artifact {path} is damaged or foreign ({i}): copy or export it again";raise r(g)from None
	return b,bK(u,n)
def am(first,m,b,r):c=min(m,max(first+r,b));a=k.array([*range(c,m,r),m],dtype=k.int64);return k.stack([k.maximum(a-b,0),k.append(first,a[:-1]),a],axis=1)
def ae(c,b):f=l.ceil(len(c)/(b.micro_batch_tokens//b.train_seq_len));return list(c.tensor_split(f))if f else[]
class O:
	def __init__(a,tokens,table,b,e,f):h=b.train_seq_len;g=f"data_path: {len(tokens)} validation tokens are not more than a window of {h}";m(len(tokens)>h,f"{g}: prepare more text or lower train_seq_len");a.hp,a.table,a.runtime,a.log=b,table,e,f;a.tokens=d.from_numpy(tokens.astype(k.int32)).to(e.device);a.num_targets=len(tokens)-1;a.bytes=table.of(a.tokens[:-1],a.tokens[1:]);a.deadline=l.inf;a.clear()
	def clear(a):a.losses=d.zeros(a.num_targets+1,device=a.runtime.device);a.times_scored=d.zeros_like(a.losses,dtype=d.int32);a.started=a.mark=h.perf_counter()
	@d.no_grad()
	def score(a,model,p,passes,r):
		h,e,i=a.hp.train_seq_len,a.hp.eval_batch_seqs,a.runtime.device;s=p[a.runtime.share(len(p))];x=s[:,1]>=s[:,0]+h-r
		for(w,j)in((s[x],r),(s[~x],h)):
			for g in(w[b:b+e]for b in range(0,len(w),e)):c=k.pad(g,((0,e-len(g)),(0,0)));f,u,m=d.from_numpy(c).to(i).unsqueeze(2).unbind(1);n=a.tokens[f+d.arange(h+1,device=i)];l,q=model(n[:,:-1],n[:,1:],passes,score_last=j);t=f+d.arange(h-j,h,device=i);v=(t>=u)&(t<m);o=d.where(v,t,a.num_targets).flatten();a.losses.index_copy_(0,o,l.flatten());a.times_scored.index_add_(0,o,d.ones_like(o,dtype=d.int32))
	def report(a,name,*first,**m):
		for b in(a.losses,a.times_scored):a.runtime.sum_(b)
		assert bool((a.times_scored[:-1]==1).all()),'every target is scored exactly once';f,d=a.losses[:-1].double().sum().item(),int(a.bytes.sum());s={'val_loss':f"{f/a.num_targets:.8f}"};s|={'val_bpb':f"{f/l.log(2)/d:.8f}"};p={'tokens':a.num_targets,'bytes':d};e=f"{h.perf_counter()-a.started:.3f}";a.log.event(name,**dict(first),**s,**p,seconds=e,**m)
	def run(a,name,model,r,passes,**b):
		a.clear();p=am(0,a.num_targets,a.hp.train_seq_len,r);f=l.ceil(len(p)/(8*a.hp.eval_batch_seqs*a.runtime.world_size))
		for(i,g)in enumerate(k.array_split(p,f)):a.score(model,g,passes,r);a.log.progress((i+1)/f,name)
		a.report(name,*b.items())
	def run_ttt(a,model,passes):
		b,j=a.hp,P(model);f=d.optim.SGD([j.whole(slice(None))],b.ttt_lr,b.ttt_momentum);a.clear();e,q,h=range(0,a.num_targets,b.ttt_chunk_tokens),k.zeros(2),0
		for(i,u)in enumerate(e):
			m,n=min(u+b.ttt_chunk_tokens,a.num_targets),len(e)-i-1;p=am(u,m,b.train_seq_len,b.eval_stride);a.score(model,p,passes,b.eval_stride);a.report_chunk(i+1,len(e),m);q[0]+=a.lap()
			if n:r=.5*(1+l.cos(l.pi*i/(len(e)-1)));f.param_groups[0]['lr']=b.ttt_lr*r;o,g=q/(i+1,max(h,1));c=a.affordable_epochs(n*o,n*g);a.train_on(model,j,f,range(u,m),passes,c);q[1],h=q[1]+a.lap(),h+c
		a.report('legal_ttt_exact',epochs=f"{h}/{b.ttt_epochs*(len(e)-1)}")
	def lap(a):a.runtime.barrier();n,a.mark=a.mark,h.perf_counter();return a.mark-n
	def affordable_epochs(a,o,g):b=.95*(a.deadline-a.mark-o);c=min(max(b/max(g,1e-09),0),a.hp.ttt_epochs);return a.runtime.from_main(int(c))
	def report_chunk(a,c,b,m):
		a.log.progress(c/b,'legal_ttt')
		if c%max(1,b//20)==0:f=a.runtime.sum_(a.losses[:m].double().sum()).item();d=f/l.log(2)/int(a.bytes[:m].sum());e=f"{h.perf_counter()-a.started:.1f}s";a.log.event('ttt_chunk',chunk=f"{c}/{b}",val_bpb=d,time=e)
	def train_on(a,model,j,f,o,passes,epochs):
		b,h=a.hp,a.hp.train_seq_len;k=range(o.start,o.stop-h+1,h);e=d.tensor(k,dtype=d.int64,device=a.tokens.device)
		for n in list(e.split(b.ttt_batch_seqs))*epochs:
			s=n[a.runtime.share(len(n))]
			for g in ae(s,b):c=a.tokens[g[:,None]+d.arange(h+1,device=g.device)];l,q=model(c[:,:-1],c[:,1:],passes);(l.sum()/(len(n)*h)).backward()
			i=a.runtime.sum_(j.grad).norm();j.grad.mul_((b.ttt_grad_clip/(i+1e-06)).clamp(max=1.));f.step();j.grad.zero_()
def w():return d._dynamo.utils.counters['stats']['unique_graphs']
class ax:
	def __init__(a,b,e,elapsed=.0,progress=.0):a.hp,a.runtime,a.work,a.signal=b,e,None,0;a.ahead=2 if e.device.type=='cuda'else 1;a.shared=d.tensor([progress,.0,.0,.0],dtype=d.float64);a.recent=bh([.0],maxlen=16);a.checkpoint=a.interrupted=False;e.barrier();a.last=a.last_checkpoint=h.perf_counter();a.started=a.last-elapsed
	def __enter__(a):
		def c(number,frame):a.signal=number
		a.handlers={b:g.signal(b,c)for b in(g.SIGTERM,g.SIGINT)}
	def __exit__(a,*i):
		for(b,c)in a.handlers.items():g.signal(b,c)
	def elapsed(a):return h.perf_counter()-a.started
	def exclude(a,seconds):a.started,a.last=a.started+seconds,a.last+seconds
	def progress(a,step):
		b=a.hp.iterations
		if a.work is not None:a.work.wait()
		g,f,d,e=a.shared.tolist();a.checkpoint,a.interrupted=d>0,e>0;c=.0 if b is None else step/b if b else 1.;o=1. if f or a.interrupted else max(g,c)
		if o<1:a.tell()
		return o
	def tell(a):
		b,e=a.hp,h.perf_counter();k,a.last=e-a.last,e;f=a.elapsed()+a.ahead*k;c=(b.max_wallclock_seconds or l.inf)-b.reserve_seconds;a.recent.append(k);j=b.checkpoint_seconds or l.inf;i=e-a.last_checkpoint>=j and c-f>=j;a.last_checkpoint=e if i else a.last_checkpoint;g=max(float(a.shared[0]),min(f/c,1.));m=[g,f+max(a.recent)>c,i];m=[float(o)*a.runtime.is_main for o in m];a.shared=d.tensor([*m,float(a.signal)],dtype=d.float64)
		if a.runtime.world_size>1:a.work=n.all_reduce(a.shared,async_op=True)
class aT:
	def __init__(a,model,loader,c,g=None):a.hp,a.model,a.loader,a.evaluator=model.hp,model,loader,c;a.runtime,a.log,a.table=c.runtime,c.log,c.table;a.flat,a.checkpoints=P(model,a.runtime.world_size),g;a.floor_index=None;a.norms=[]
	def accumulate(a,n,passes,floor):
		b=a.hp;r=d.zeros(3+3*passes,device=a.runtime.device)
		for g in ae(n,b):h,o=g[:,:-1],g[:,1:];l,q=a.model(h,o,passes,floor);f,j=l.sum(),q.jacobian_proxy.sum();c=b.jacobian_proxy_weight*j/b.batch_seqs;(f/b.train_batch_tokens+c).backward();p=d.stack([f.detach(),a.table.of(h,o).sum(),j.detach()]);r+=d.cat([p,len(g)*d.cat(q[1:])])
		return r
	def warm_up(a):
		b,j,e,v=a.hp,a.flat,a.runtime,a.flat.data.clone();f=d.Generator().manual_seed(b.seed);c=af(d.randint,b.vocab_size,generator=f,dtype=d.int32);l,s=S(j,b,e),d.ones((),device=e.device);p=bF(b);k=max(b.warmup_steps,len(p))if b.warmup_steps else 0
		for i in range(k):m,h=p[i*len(p)//k];n=c(a.loader.shape).to(e.device);a.accumulate(n,m,s if h else None);l.step(l.reduce(),1.,.9);j.grad.zero_();a.log.progress((i+1)/k,'warm-up')
		if k and a.model.region is Y:g=c((b.ttt_chunk_tokens+2*b.train_seq_len,)).numpy();o=O(g,a.table,b,e,R(None));ab(be.deepcopy(a.model),o)
		j.data.copy_(v)
	def train(a):
		b,j,f=a.hp,a.flat,a.log;l,k=S(j,b,a.runtime),aU(b,j.data);g,n,t=a.resume(l,k);p,c=w(),ax(b,a.runtime,t,k.last_progress)
		with c:
			while(o:=c.progress(g))<1:
				if c.checkpoint:a.save(g,l,k,c);c.last=h.perf_counter()
				e=J(b,g,o);s=a.announce(g,o,n,e);r=a.accumulate(a.loader.batch(g),e.num_passes,s);i=l.reduce();l.step(i,e.lr_scale,e.momentum);j.grad.zero_();k.update(o,e.swa);a.watch(g,i);g,n=g+1,e
				if g%b.train_log_every==0 or g in(1,10):a.log_step(g,e,r,i,c)
				if b.val_loss_every and g%b.val_loss_every==0:a.validate(g,e.num_passes,c)
				f.progress(o,f"step {g}, {e.num_passes} passes")
			a.watch(g,None);a.runtime.barrier();q,x=at(c,g),w()-p;u=d.cuda.max_memory_allocated()>>20 if d.cuda.is_initialized()else 0;m={'graphs_compiled_after_start':x,'peak_memory_mib':u};f.event('stop',step=g,**q,**m,interrupted=int(c.interrupted));v=c.interrupted and b.on_signal=='checkpoint'
			if v and a.save(g,l,k,c):return N
		f.event('weight_average',kind=b.weight_average,swa_samples=k.samples);j.data.copy_(k.result());return az if c.interrupted else 0
	def announce(a,step,progress,n,e):
		b={'step':step,'progress':progress}
		if n is None or e.num_passes!=n.num_passes:a.log.event('progressive_passes',**b,num_passes=e.num_passes)
		if e.swa and not(n and n.swa)and'swa'in a.hp.weight_average:a.log.event('swa',**b)
		if not e.qat:return
		if a.floor_index is None:h=a.hp.artifact_limit_bytes-X();k=aa(a.flat.named(a.flat.data),h);a.floor_index=c=a.runtime.from_main(k);a.log.event('late_qat',**b,floor_index=c,floor=j(c))
		return d.full((),j(a.floor_index),device=a.runtime.device)
	def watch(a,step,i):
		if i is not None:
			c=d.cuda.Event()if i.is_cuda else None;a.norms.append((step,i.detach().to('cpu',non_blocking=True),c))
			if c is not None:c.record()
		while len(a.norms)>(i is not None and i.is_cuda):
			b,k,c=a.norms.pop(0)
			if c is not None:c.synchronize()
			if not l.isfinite(k):g=f"step {b+1}: the gradient's norm is {k.item()}, the run has diverged";raise FloatingPointError(f"{g}: lower matrix_lr or residual_scale_init")
	def log_step(a,step,e,r,i,c):b=a.hp;f,d,j,*g=a.runtime.sum_(r).tolist();g=(k.array(g).reshape(3,-1)/b.batch_seqs).tolist();m={'step':f"{step}/{b.iterations}"if b.iterations else step};m|={'train_loss':f"{f/b.train_batch_tokens:.4f}"};m|={'train_bpb':f"{f/l.log(2)/d:.4f}"};m|={'jacobian_proxy':j/b.batch_seqs,'grad_norm':i.item()};m|={'lr_scale':e.lr_scale,'passes':e.num_passes,'qat':int(e.qat)};m|=zip(('growth','update','feedback_norm'),g,strict=True);m|={'residual_scale':a.model.recurrence.residual_scale.tolist()};a.log.event(**m,**at(c,step))
	def validate(a,step,passes,c):a.runtime.barrier();b=h.perf_counter();a.evaluator.run('validation',a.model,a.hp.train_seq_len,passes,step=step);c.exclude(h.perf_counter()-b)
	def run_state(a,l,average):f={'data':a.flat.data,'first':l.first,'second':l.second};f|={'ema':average.ema,'swa':average.swa};return{c:d for(c,d)in f.items()if d is not None}
	def fixed_settings(a):f='seed','train_batch_tokens','shuffle','weight_average';return a.hp.architecture()|{c:getattr(a.hp,c)for c in f}
	def save(a,step,l,average,c):
		if a.runtime.world_size>1:
			for f in[l.gather(l.first,h)for h in q]:f.wait()
		G=a.runtime.is_main and a.checkpoints is not None;return a.runtime.from_main(G and a.write(step,l,average,c))
	def write(a,step,l,average,c):
		r=a.run_state(l,average).items();p=average.samples,average.last_progress,average.last_sample;m={'step':step,'elapsed':c.elapsed(),'floor_index':a.floor_index};m|={'average':p,'settings':a.fixed_settings()};n={k:{o:e.to('cpu',copy=True)for(o,e)in a.flat.named(g).items()}for(k,g)in r};j,h=v.BytesIO(),a.checkpoints/f"step_{step:08d}.pt";d.save(m|{'tensors':n},j);q=z.sha256(j.getbuffer()).digest()
		try:
			h.parent.mkdir(parents=True,exist_ok=True);C(h,q+j.getvalue());b=sorted(h.parent.glob('step_*.pt'),key=lambda f:(f<=h,f))
			for s in[*b[:-2],*h.parent.glob('step_*.tmp')]:s.unlink()
		except OSError as i:a.log.event('checkpoint_failed',path=h,reason=i.strerror);return False
		a.log.event('checkpoint',step=step,path=h,bytes=32+j.tell());return True
	def resume(a,optimizer,average):
		f=a.hp.resume and bC(a.checkpoints,a.runtime,a.log)
		if not f:return 0,None,.0
		e,g=a.fixed_settings(),f['step'];b=[f"{k}={e[k]} (was {j})"for(k,j)in f['settings'].items()if e[k]!=j];m(not b,f"resume: the checkpoint has other settings: {', '.join(b)}")
		for(o,d)in a.run_state(optimizer,average).items():
			for(c,h)in a.flat.named(d).items():h.copy_(f['tensors'][o][c])
		for l in optimizer.adam.state.values():l['step'].fill_(g)
		a.floor_index=f['floor_index'];average.samples,average.last_progress,average.last_sample=f['average'];n=J(a.hp,g-1,average.last_progress);a.log.event('resume',step=g,train_time=f"{1000*f['elapsed']:.0f}ms");return g,n,f['elapsed']
def bC(a,e,f):
	b=sorted(a.glob('step_*.pt'),reverse=True)
	for h in e.from_main(b):
		c=e.from_main(h.read_bytes()if e.is_main else None)
		if z.sha256(c[32:]).digest()==c[:32]:return d.load(v.BytesIO(c[32:]),map_location='cpu',weights_only=True)
		f.event('checkpoint_damaged',path=h)
def at(c,step):a=1000*c.elapsed();k=f"{a/max(1,step):.2f}ms";return{'train_time':f"{a:.0f}ms",'step_avg':k}
def X():return o(__file__).stat().st_size
def C(path,data):
	a=path.with_name(path.name+'.tmp')
	try:a.write_bytes(data);a.replace(path)
	except OSError:a.unlink(missing_ok=True);raise
def bs(b,g,e,f):
	a=o(__file__).read_bytes();q=z.sha256(a).hexdigest();f.event('code',name=o(__file__).name,bytes=len(a),sha256=q);i={'torch':d.__version__,'cuda':d.version.cuda,'numpy':k.__version__};i|={'sentencepiece':ao.__version__};f.event('versions',python=ai.python_version(),**i);h=e.device.type=='cuda';c=d.cuda.get_device_name()if h else f"{ai.machine()} x{s.cpu_count()}";f.event('device',name=c,world_size=e.world_size,dtype=str(e.dtype)[6:])
	for n in u(b):f.event('config',name=n.name,value=getattr(b,n.name),source=g[n.name])
def W(b,e,f):c,i=bc(b,e);a=b.compile=='on'or b.compile=='auto'and e.device.type=='cuda';d._dynamo.config.recompile_limit=128;d.manual_seed(b.seed);q=Q(b,e.dtype,i,a).to(e.device);j=sum(p.numel()for p in q.parameters());f.event('model',parameters=j,attention=c,compile='on'if a else'off');return q
def bl(b,tensors,path,f):
	a,e=X(),F(af(bd,b,tensors));h=b.artifact_limit_bytes-a;k=aa(tensors,h);c=bq(lambda c:len(e(c)),k,h,f);d,c=c is not None,c or 0;path=path if d else path.with_suffix('.oversize.xz')
	try:C(path,e(c))
	except OSError as i:path=o(bH.mkdtemp(prefix='train_gpt_'))/path.name;f.event('warning',text=f"output_dir: {i.strerror}; the artifact is {path}");C(path,e(c))
	q,n=path.stat().st_size,h-path.stat().st_size;p={'code_bytes':a,'model_bytes':q,'total_bytes':a+q};l={'floor_index':c,'floor':j(c)};f.event('artifact',path=path,**p,margin_bytes=n,**l);g=f"artifact_limit_bytes={b.artifact_limit_bytes}: code and model need {a+q}";m(d,f"{g} at the coarsest setting, kept as {path}: make the model smaller");return path
def U(b,n):h=n.train_seq_len;a={'train_batch_tokens':h,'micro_batch_tokens':max(h,b.micro_batch_tokens)};a|={'eval_stride':min(h,b.eval_stride)};a|={'eval_passes':b.eval_passes or n.passes_in_evaluation};return bD(b,**n.architecture()|a)
def ab(model,c):
	b=c.hp;m=b.passes_in_evaluation;c.run('final_int6_roundtrip_exact',model,b.train_seq_len,m)
	if b.sliding_eval:c.run('final_int6_sliding_window_exact',model,b.eval_stride,m)
	if b.ttt_enabled:c.run_ttt(model,m)
def bw(b,e,f):
	j=br(o(b.tokenizer_path),b.vocab_size);g,d=aS(j,e.device),None
	for i in('val',)if b.evaluate else('train','val'):
		a=bp(o(b.data_path),i);bb(a[e.rank::e.world_size],b.vocab_size);c=[H(h)for h in a];p={'shards':len(c),'tokens':sum(map(len,c))};f.event('data',split=i,**p,fingerprint=bg(a))
		if i=='train':d=au(c,b,e)
	l=k.concatenate(c);ba(j,g,l);return d,O(l,g,b,e,f)
def aZ(b):l,a=o(b.token_losses or'losses.npy'),o(b.output_dir);g=f"token_losses={l} must be a file in a folder that exists: choose another path";m(l.parent.is_dir()and not l.is_dir(),g);a=next(h for h in(a,*a.absolute().parents)if h.exists());c,d=bG.disk_usage(a).free,b.artifact_limit_bytes;g=f"output_dir={b.output_dir} has {c} bytes left for an artifact of up to {d}";m(bool(b.evaluate)or c>d,f"{g}: make room or choose another folder")
def run(b,g,e,k):
	j=h.strftime('%Y%m%d_%H%M%S');a=e.from_main(b.run_id or f"{j}_seed{b.seed}");aZ(b)
	if b.evaluate:n=aj(o(b.evaluate))[0]if e.is_main else None;b=U(b,e.from_main(n));g|=dict.fromkeys(b.architecture(),'artifact')
	f=R(o(b.output_dir)/f"{a}.txt"if e.is_main else None,b.resume);f.event('run',run_id=a,started=j);bs(b,g,e,f);f.since=k;f.phase('start');d,c=bw(b,e,f);e.barrier();f.open();f.phase('data');l=o(b.evaluate or o(b.output_dir)/f"{a}.int6.xz")
	try:return bJ(b,d,c,l)
	except Exception as i:f.event('failed',text=(str(i)or repr(i)).splitlines()[0]);raise
def bJ(b,loader,c,artifact):
	e,f,a=c.runtime,c.log,0
	if loader is not None:
		g=artifact.with_name(artifact.name.replace('.int6.xz','.checkpoints'));d=aT(W(b,e,f),loader,c,g);d.warm_up();f.phase('warm_up');a=d.train();f.phase('training')
		if a==N:return a
		m=b.passes_in_evaluation;c.run('pre_quant_exact',d.model,b.train_seq_len,m);f.phase('pre_quant_evaluation')
		if e.is_main:artifact=bl(b,d.flat.named(d.flat.data),artifact,f)
		f.phase('export')
	c.deadline=h.perf_counter()+(b.eval_wallclock_seconds or l.inf);p=w();n,r=e.from_main(aj(artifact)if e.is_main else None);q=W(U(b,n),e,f);q.load_state_dict(r);ab(q,c);f.event('evaluated',graphs_compiled=w()-p);f.phase('evaluation')
	if b.token_losses and e.is_main:j=v.BytesIO();k.save(j,c.losses[:-1].cpu().numpy());C(o(b.token_losses),j.getvalue())
	return a
def G():
	e,k=None,h.perf_counter()
	try:b,g=ak(s.environ,c.argv[1:]);e=aK.start(b);a=run(b,g,e,k);e.barrier();return a
	except(r,FloatingPointError)as i:print('\n'.join(f"error: {j}"for j in str(i).splitlines()),file=c.stderr);return aA if isinstance(i,r)else ay
	finally:
		if e is not None and e.world_size>1:n.destroy_process_group()
if __name__=='__main__':c.exit(G())
