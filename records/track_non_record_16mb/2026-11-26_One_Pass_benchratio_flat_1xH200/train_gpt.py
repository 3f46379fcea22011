"Stable Growing Recurrence: a GPT that grows by re-applying its core while it trains.\n\n    stem -> core, core, ... -> tail      1 pass, then 2, then 3 as the run proceeds\n\nOne run trains for a fixed wall clock, averages the weights, quantizes them to int6 and compresses\nthem so that code and model fit 16,000,000 bytes. Then it reloads the file and scores the validation\ntext in bits per byte: plain, with sliding windows, and with score-first test-time training.\n\n    torchrun --standalone --nproc_per_node=8 train_gpt.py        one node of 8 GPUs, 600 s\n    python train_gpt.py                                          one process, GPU or CPU\n    python train_gpt.py --env scripts/demo.env                   the settings of a file\n    python train_gpt.py --evaluate logs/RUN.int6.xz              score an artifact again\n    python train_gpt.py --run-id RUN --resume                    go on from RUN's last checkpoint\n\nEvery setting is a flag (--residual-scale-init) and an environment variable (RESIDUAL_SCALE_INIT);\na flag wins over a variable, and a variable over --env's file. Exit codes: 0 done, 1 ended at once\nby a signal, 2 a mistake in what was given, 3 diverged, 4 stopped by a signal with a checkpoint,\n5 stopped by a signal but exported and scored.\n"
from __future__ import annotations
Ax=FloatingPointError
Aw=RecursionError
Av=RuntimeError
Au=KeyError
At=ImportError
z=staticmethod
y=print
r=sorted
k=set
j=ValueError
Y=property
X=isinstance
T=slice
S=OSError
Q=zip
P=getattr
M=min
E=max
D=len
import argparse as l,bisect as AC,copy,difflib,fcntl as A0,hashlib as m,io,json as A1,lzma as d,math as F,os as Z,platform as AD,shutil,signal as a,struct as AE,sys as b,tempfile as Ay,time as L
from collections import deque
from collections.abc import Callable as Az,Iterator as A_,Mapping,Sequence
from concurrent.futures import Future,ThreadPoolExecutor as AF
from contextlib import contextmanager as B0,suppress as s
from dataclasses import dataclass as AG,field,fields as n,replace as A2
from datetime import timedelta as B1
from functools import cache as A3,partial as e,wraps
from itertools import pairwise as B2
from pathlib import Path as K
from typing import Any as f,Literal,NamedTuple as g,get_args as B3,get_type_hints as B4
from urllib.parse import quote
try:import numpy as G,sentencepiece as AH,torch as A,torch.distributed as R,torch.nn.functional as J;from torch import Tensor as C,library,nn as N;from torch.nn.attention import SDPBackend as B5,sdpa_kernel as B6
except At as B7:b.exit(f"error: {B7.name} is not installed: run pip install -r requirements.txt")
try:import triton,triton.language as tl;from triton.tools.tensor_descriptor import TensorDescriptor as B8
except At:triton=None
B9,BA,AI,BB=2,3,4,5
BC=B1(seconds=300)
BD,BE,BF=20240520,1,256
AJ=1e-06
BG='CUDNN_ATTENTION','FLASH_ATTENTION','EFFICIENT_ATTENTION','MATH'
U='mlp_up_bank','mlp_down_bank','qo_bank','kv_bank'
AK='table','projection','scalar'
BH=3.4445,-4.775,2.0315
BI=.85
BJ=.999,.9995,.9999,.99999,1.
V,BK=31,127
BL=65536
BM,A4=512,7168
BN=[{'id':d.FILTER_LZMA2,'preset':6,'dict_size':4096,'lc':0,'lp':0,'pb':0}]
AL=b'SGR1'
BO=1<<30
class O(j):0
def I(rule_holds,text):
	if not rule_holds:raise O(text)
def B(default,text,least=0,group=''):return field(default=default,metadata={'text':text,'least':least,'group':group})
@AG(frozen=True)
class c:
	run_id:str|None=B(None,'name of log and artifact; none: time and seed',group='run');seed:int=B(1337,'seed of the weights and of the data order');output_dir:str=B('logs','folder of the log, the artifact and the checkpoints');iterations:int|None=B(None,'steps after which training ends; none: no limit');max_wallclock_seconds:float|None=B(6e2,'seconds of training; none: no limit',.001);warmup_steps:int=B(20,'steps before the clock starts, undone before it does');train_log_every:int=B(50,'steps between lines of the log',1);val_loss_every:int|None=B(None,'steps between validations; none: at the end',1);checkpoint_seconds:float|None=B(None,'seconds between checkpoints; none: off',.001);resume:bool=B(False,'go on from the newest checkpoint of run_id, if there is one');on_signal:Literal['export','checkpoint']=B('export','at SIGTERM, SIGINT or SIGHUP');dtype:Literal['auto','bfloat16','float32']=B('auto','auto: bfloat16 where it is native');compile:Literal['auto','on','off']=B('auto','torch.compile; auto: on a GPU only');data_path:str=B('data/datasets/fineweb10B_sp1024','folder of the shards',group='data');tokenizer_path:str|None=B(None,"none: data_path's tokenizer.model, or the field's");train_batch_tokens:int=B(786432,'tokens of a step; default: 98,304 a process',1);micro_batch_tokens:int=B(98304,'most tokens that a rank takes at once',1);shuffle:bool=B(True,'read the windows of all shards in a seeded random order');vocab_size:int|None=B(None,"pieces; none: the tokenizer's",8,group='model');train_seq_len:int=B(2048,'tokens of a window, in training and evaluation',8);num_layers:int=B(11,'unique layers',1);model_dim:int=B(512,'width of the residual stream',1);num_heads:int=B(8,'query heads',1);num_kv_heads:int=B(4,'key and value heads',1);mlp_mult:float=B(3.,'MLP width over model width');rope_base:float=B(1e4,'RoPE base at a length of 1,024 tokens',1);rope_dims:int=B(16,'dims of each head that RoPE turns');qk_gain_init:float=B(1.5,'start of the gain of each query head',-F.inf);xsa_last_n:int=B(4,"last layers with XSA (never the core's)");bigram_vocab_size:int=B(512,'rows of BigramHash; 0: off');bigram_dim:int=B(32,"width of BigramHash's rows",1);ve_dim:int=B(128,'width of the value embedding table',1);ve_layers:str=B('9,10','layers with value embeddings; none: off');logit_softcap:float=B(3e1,'bound of the logits',.001);tied_embed_init_std:float=B(.005,'std of the embedding at the start');core_start:int=B(4,'first layer of the core',group='recurrence');core_end:int=B(7,"layer after the core's last",1);passes_schedule:str=B('0.0:1,0.6:2','start:passes,...; fractions or steps');num_passes:int|None=B(None,"fixed passes in training; none: the schedule's",1);eval_passes:int|None=B(None,'passes in evaluation; none: as training ended',1);residual_scale_init:float=B(1.,"start of each later pass's scale",-F.inf);feedback_mode:Literal['none','identity','diagonal']=B('none',"d * U(V'h)");feedback_rank:int=B(2,'columns of U and V',1);per_pass_feedback:bool=B(False,'a d of its own for each pass');jacobian_proxy_weight:float=B(.01,'weight of the proxy in the loss');interpass_rmsnorm:bool=B(False,'rms_norm of h before each pass after the first');matrix_lr:float=B(.025,"Muon's learning rate",group='optimization');tied_embed_lr:float=B(.035,"AdamW's learning rate of the tables");scalar_lr:float=B(.025,"AdamW's learning rate of all else");muon_momentum:float=B(.99,"Muon's momentum");muon_momentum_warmup_start:float=B(.92,"Muon's first momentum");muon_momentum_warmup_frac:float=B(.237,'its rise (1,500 of 6,330 steps)',1e-09);muon_momentum_frac:float=B(.0158,'its longest average (100 of 6,330 steps)',1e-09);muon_row_norm:bool=B(True,"level the rows of Muon's gradient first (MuonEq-R)");muon_backend_steps:int=B(5,'Newton-Schulz iterations',1);muon_wd:float=B(.04,'decoupled weight decay of the banks');adam_wd:float=B(.04,'decoupled weight decay of tables and projections');beta1:float=B(.9,"AdamW's first decay");beta2:float=B(.95,"AdamW's second decay");adam_eps:float=B(1e-08,"AdamW's epsilon");grad_clip_norm:float=B(.3,"bound of the global gradient's norm");warmdown_frac:float=B(.55,'last fraction, in which the lr falls to 0',1e-09);weight_average:Literal['none','ema','swa','ema_swa']=B('ema','exported',group='end');ema_frac:float=B(.0526,"EMA's horizon (decay 0.997 in 6,330 steps)",1e-09);swa_frac:float=B(.0079,"fraction between SWA's samples (50 of 6,330 steps)");swa_lr_scale:float=B(.2,'SWA starts below this lr scale');late_qat_threshold:float=B(.15,'QAT starts below this lr scale; 0: never');qat_scope:Literal['core','all']=B('core','layers under QAT');evaluate:str|None=B(None,'score this artifact, do not train',group='evaluation');artifact_limit_bytes:int=B(16000000,'most bytes of code and model together',1);eval_wallclock_seconds:float|None=B(6e2,'TTT epochs drop to end within this');eval_stride:int=B(64,'tokens that a sliding window scores',1);eval_batch_seqs:int=B(64,'windows that a rank scores at once',1);sliding_eval:bool=B(True,'score with sliding windows');ttt_enabled:bool=B(True,'score with score-first test-time training');ttt_lr:float=B(.002,"SGD's learning rate for the first chunk");ttt_momentum:float=B(.9,"SGD's momentum");ttt_epochs:int=B(3,'epochs over each chunk once it is scored');ttt_chunk_tokens:int=B(32768,'tokens of a chunk',1);ttt_batch_seqs:int=B(32,'most sequences of an SGD step, all ranks together',1);ttt_grad_clip:float=B(1.,"bound of the gradient's norm");token_losses:str|None=B(None,"write the last evaluation's losses here (.npy, nats)")
	def __post_init__(C):
		A=[]
		for D in n(C):
			B,E=P(C,D.name),D.metadata['least'];G=X(B,(int,float))
			if G and not(F.isfinite(B)and B>=E):A.append(f"{D.name}={B} must be a finite number of at least {E}")
		A=A or[B for(A,B)in C.rules()if not A];I(not A,'\n'.join(A))
	def rules(A):B,C,I,J=A.train_seq_len,A.num_layers,A.head_dim,A.max_passes;K,F,L,G=A.model_dim,A.num_heads,A.num_kv_heads,A.train_batch_tokens;M,N,H=A.core_start,A.core_end,A.ve_layer_ids;O=D(k(H))==D(H)and all(0<=A<C for A in H);P=A.iterations is None and A.max_wallclock_seconds is None;Q='starts rise from 0, all steps or all fractions below 1, passes are 1..64';return[(not P,'iterations, max_wallclock_seconds: set one, or training never ends'),(bool(A.run_id)or not A.resume,'resume: name the run that goes on, --run-id'),(G%B==0,f"train_batch_tokens={G}: use {E(1,G//B)*B} or such"),(A.micro_batch_tokens>=B,f"micro_batch_tokens: must hold a window of {B} tokens"),(B<=1<<20,f"train_seq_len={B} must be at most {1<<20}"),((A.vocab_size or 0)<=65536,'vocab_size: token ids are 16 bits wide'),(M<N<=C,f"core_start={M}, core_end={N}: no part of the {C} layers"),(A.mlp_dim>=1,f"mlp_mult={A.mlp_mult} leaves no MLP: raise it"),(K%F==F%L==0,f"model_dim={K}, num_heads={F}, num_kv_heads={L} must divide"),(A.rope_dims%2==0 and A.rope_dims<=I,f"rope_dims: even and up to {I}"),(A.bigram_vocab_size!=1,'bigram_vocab_size: use 0 (off) or at least 2'),(A.eval_stride<=B,f"eval_stride: would skip tokens, use at most {B}"),(O,f"ve_layers={A.ve_layers}: use different layers of 0..{C-1}, or none"),(E(A.beta1,A.beta2)<1,'beta1, beta2: must be below 1'),(1<=J<=64,f"passes_schedule={A.passes_schedule}: {Q}"),((A.eval_passes or 1)<=(64 if J>1 else 1),'eval_passes: at most 64, or 1')]
	@Y
	def head_dim(self)->int:return self.model_dim//self.num_heads
	@Y
	def batch_seqs(self)->int:return self.train_batch_tokens//self.train_seq_len
	@Y
	def mlp_dim(self)->int:return int(self.mlp_mult*self.model_dim)
	@Y
	def kv_dim(self)->int:return self.head_dim*self.num_kv_heads
	@Y
	def ve_layer_ids(self)->tuple[int,...]:A=[]if self.ve_layers in('','none')else self.ve_layers.split(',');return tuple(int(A)if A.strip().isdecimal()else-1 for A in A)
	@Y
	def growth(self)->tuple[tuple[int|float,int],...]:A=self;return((0,A.num_passes),)if A.num_passes else BP(A.passes_schedule)
	@Y
	def max_passes(self)->int:return E((A for(B,A)in self.growth),default=0)
	def architecture(C):
		D,A={},''
		for B in n(C):
			A=B.metadata['group']or A
			if A in('model','recurrence'):D[B.name]=P(C,B.name)
		return D
@A3
def BP(text:str)->tuple[tuple[int|float,int],...]:
	with s(j):
		C=[A.split(':')for A in text.split(',')];B=tuple((float(s)if'.'in s else int(s),int(A))for(s,A)in C);A=[A for(A,B)in B];E=A[0]==0 and all(a<b for(a,b)in B2(A));F=D({type(A)for A in A[1:]})<=1
		if E and F and(X(A[-1],int)or A[-1]<1):return B if M(A for(B,A)in B)>=1 else()
	return()
def BQ(kind,text):
	C=kind;B=text;A,D=B3(C),B.strip().lower()
	if C is bool:return{'0':False,'false':False,'1':True,'true':True}[D]
	if type(None)in A:return None if D in('','none')else A[0](B)
	return A[A.index(B)]if A else C(B)
def BR():
	E,J,F=(__doc__ or'').partition('\n\n');G='train_gpt.py [--SETTING VALUE ...]';B=l.ArgumentParser('train_gpt.py',G,E,F,allow_abbrev=False);B.formatter_class=l.RawDescriptionHelpFormatter;B.add_argument('--env',metavar='FILE',help='a file of lines NAME=VALUE');C=B
	for A in n(c):
		if A.metadata['group']:C=B.add_argument_group(A.metadata['group'])
		H=str(A.type).replace('Literal','one of ');D={'metavar':H,'default':l.SUPPRESS}
		if A.type=='bool':D={'action':l.BooleanOptionalAction,'default':l.SUPPRESS}
		I=f"{A.metadata['text']} [{A.name.upper()}={A.default}]";C.add_argument('--'+A.name.replace('_','-'),help=I,**D)
	return B
def BS(path):
	A=path
	try:D=K(A).read_text(encoding='utf-8-sig').splitlines()
	except(S,j)as E:raise O(f"env={A} cannot be read ({E}): name a text file")from None
	F=[A.split('=',1)for A in D if'='in A and A[0]!='#'];B={A.strip().lower():B.strip()for(A,B)in F};C=B.keys()-{A.name for A in n(c)};I(not C,f"env={A} has no settings {', '.join(C)}: see --help");return B
def AM(env,argv):
	H=env;J,P=BR().parse_known_args(argv);K,B,C,F=B4(c),[],{},{}
	for L in P:M=difflib.get_close_matches(L,['--'+A.replace('_','-')for A in K],1);Q=f"did you mean {M[0]}?"if M else'see --help';B.append(f"unknown argument {L}: {Q}")
	R={A:H[A.upper()]for A in K if A.upper()in H};G={'flag':J.__dict__,'env':R};G['file']=BS(J.env)if J.env else{}
	for(A,S)in K.items():
		F[A]=next((s for s in G if A in G[s]),'default');D=G.get(F[A],{}).get(A)
		try:
			if D is not None:C[A]=D if X(D,bool)else BQ(S,D)
		except(j,Au):T=c.__annotations__[A].replace('Literal','one of ');B.append(f"{A}={D} ({F[A]}) is no {T}")
	if'train_batch_tokens'not in C:N=E(1,C.get('train_seq_len',2048));U=98304*int(H.get('WORLD_SIZE',1));C['train_batch_tokens']=E(1,U//N)*N
	try:V=c(**C)
	except O as W:B.append(str(W))
	I(not B,'\n'.join(B));return V,F
@AG(frozen=True)
class AN:
	rank:int;world_size:int;device:A.device;dtype:A.dtype;compiles:bool=False
	@classmethod
	def start(J,hp:c)->AN:
		K,D=int(Z.environ.get('RANK',0)),int(Z.environ.get('WORLD_SIZE',1));B,E,C=A.device('cpu'),'gloo',A.float32
		if A.cuda.is_available():
			F,G=int(Z.environ.get('LOCAL_RANK',0)),A.cuda.device_count();I(F<G,f"nproc_per_node: only {G} GPUs are visible, start as many");B,E=A.device('cuda',F),'cpu:gloo,cuda:nccl';A.cuda.set_device(B)
			if A.cuda.get_device_capability()>=(8,0):C=A.bfloat16
		if D>1:R.init_process_group(E,timeout=BC)
		H=hp.compile=='on'or hp.compile=='auto'and B.type=='cuda';A.compiler.set_stance('default'if H else'force_eager');C=C if hp.dtype=='auto'else P(A,hp.dtype);return J(K,D,B,C,H)
	@Y
	def is_main(self)->bool:return self.rank==0
	def sum_(A,x):
		if A.world_size>1:R.all_reduce(x)
		return x
	def largest(C,value):
		B=A.tensor(value)
		if C.world_size>1:R.all_reduce(B,R.ReduceOp.MAX)
		return int(B)
	def barrier(B):B.sum_(A.zeros(1,device=B.device)).item()
	def from_main(C,value):
		B=[value]
		if C.world_size>1:R.broadcast_object_list(B,src=0,device=A.device('cpu'))
		return B[0]
	def share(A,count):return T(*(B*count//A.world_size for B in(A.rank,A.rank+1)))
def AO(value):
	A=value
	if X(A,(tuple,list)):return','.join(map(AO,A))or'none'
	if X(A,float):return f"{A:.6g}"
	B='!"#$&\'()*+,-./:;<=>?@[]^_`{|}~';return quote(str(A),safe=B,errors='surrogateescape')or'none'
class AP:
	def __init__(B,path,resume=False):
		D=resume;A=path;B.path,B.outputs,B.since=A,[],L.perf_counter();B.has_results=D
		if A is None:return
		try:A.parent.mkdir(parents=True,exist_ok=True);C=A.open('a'if D else'x',encoding='utf-8');A0.flock(C,A0.LOCK_EX|A0.LOCK_NB)
		except BlockingIOError:raise O(f"run_id: another process writes {A}: wait for its end")from None
		except S as E:F=f"output_dir: cannot write {A} ({E.strerror}): choose another folder";raise O(F)from None
		C.write('\n'if C.tell()else'');B.outputs=[b.stdout,C]
	def event(B,C='',/,**D):
		E=' '.join(filter(None,[C,*(f"{A}:{AO(B)}"for(A,B)in D.items())]))
		for A in B.outputs:
			with s(S):F='\r\x1b[K'if A.isatty()else'';y(F+E,file=A,flush=True)
	def progress(A,text):
		if A.outputs and b.stdout.isatty():y(f"\r{text}[K",end='',flush=True)
	def phase(A,name):B=L.perf_counter();A.event('phase',name=name,seconds=f"{B-A.since:.3f}");A.since=B
	def abandon(A,error):
		B=error;A.event('failed',text=(str(B)or repr(B)).splitlines()[0])
		if A.path is not None and not A.has_results:A.path.unlink(missing_ok=True)
class BT:
	def __init__(A):A.noted,A.advice=0,''
	def install(B):
		for A in(a.SIGTERM,a.SIGINT,a.SIGHUP):
			if a.getsignal(A)!=a.SIG_IGN:a.signal(A,B.handle)
	def handle(A,number,frame):
		B=number;C=a.Signals(B).name
		if A.noted or not A.advice:raise SystemExit(f"stopped by {C}")
		A.noted=B;Z.write(2,f"\n{C}: {A.advice}\n".encode())
	@B0
	def deferred(self,advice:str)->A_[None]:
		self.advice=advice
		try:yield
		finally:self.advice=''
def BU(data_path,split):B=split;A=data_path;C=r(A.glob(f"fineweb_{B}_*.bin"));D='run data/download_fineweb.py or data/prepare_text.py, or set DATA_PATH';I(bool(C),f"data_path={A} holds no fineweb_{B}_*.bin: {D}");return C
def AQ(path):A=path;B,C=A.stat().st_size,4*BF;D=G.fromfile(A,dtype='<i4',count=3).tolist();E=[BD,BE,(B-C)/2];F=f"data shard {A} of {B} bytes begins with {D} instead of {E}";I(B>C and D==E,f"{F}: download or prepare it again");return G.memmap(A,dtype='<u2',mode='r',offset=C,shape=(D[2],))
def BV(paths):
	A=m.sha256()
	for C in paths:B=AQ(C);A.update(f"{C.name}:{D(B)}:".encode());A.update(B[:4096].tobytes()+B[-4096:].tobytes())
	return A.hexdigest()[:16]
def t(hp):A=K(hp.data_path)/'tokenizer.model';B=A if A.exists()else'data/tokenizers/fineweb_1024_bpe.model';return K(hp.tokenizer_path or B)
def BW(path):
	A,B=AH.SentencePieceProcessor(),f"tokenizer_path={path}"
	try:A.LoadFromSerializedProto(path.read_bytes())
	except(Av,S):raise O(f"{B} is no SentencePiece model: set TOKENIZER_PATH")from None
	C=not A.IsUnknown(A.PieceToId('▁'));I(C,f"{B} has no piece for the space, so that bytes would be miscounted");return A
def BX(hp,pieces,largest):
	C=largest;A=pieces;B,D=t(hp),None;E=f"tokenizer_path={B} has {A} pieces, the shards' largest token is {C}";I(A/2<=C<A,f"{E}: use the tokenizer of the shards")
	with s(S,j,Au,TypeError,Aw):F=A1.loads((K(hp.data_path)/'manifest.json').read_bytes());D=F['tokenizer']['sha256']
	G=D in(None,m.sha256(B.read_bytes()).hexdigest());I(G,f"tokenizer_path={B} is not the one that manifest.json names: use that one")
class AR:
	def __init__(E,tokenizer,device):
		B=tokenizer;G=[]
		for C in range(B.vocab_size()):H=B.IdToPiece(C);F=not(B.IsControl(C)or B.IsUnknown(C)or B.IsUnused(C));I=1 if B.IsByte(C)else D(H.removeprefix('▁').encode());G.append([I*F,H.startswith('▁')*F,F])
		J=A.tensor(G,dtype=A.int32,device=device);E.length,E.space,E.inner=J.T.contiguous().unbind()
	def of(A,previous,target):B=target;return A.length[B]+A.space[B]*A.inner[previous]
class AS:
	def __init__(A,shards,hp,runtime):H=runtime;F=shards;A.shards,A.hp,A.runtime=F,hp,H;B,A.share=hp.train_seq_len,H.share(hp.batch_seqs);A.shape=A.share.stop-A.share.start,B+1;J=[E(0,D(A)//B-1)for A in F];A.first_window=G.cumsum([0,*J]);A.epoch_windows,A.epoch=int(A.first_window[-1]),-1;K=f"data_path: no training shard holds two windows of train_seq_len={B} tokens";I(A.epoch_windows>0,f"{K}: prepare more text or lower train_seq_len");A.pool=AF(1,thread_name_prefix='loader');(A.pending):dict[int,Future[C]]={}
	def window(A,index):
		B,(C,I)=A.hp.train_seq_len,divmod(index,A.epoch_windows)
		if C!=A.epoch:
			D=G.random.default_rng([A.hp.seed,C]);A.epoch,A.phase,A.order=C,0,G.arange(A.epoch_windows)
			if A.hp.shuffle:A.phase=int(D.integers(B));D.shuffle(A.order)
		E=int(A.order[I]);F=AC.bisect_right(A.first_window,E)-1;H=A.phase+(E-int(A.first_window[F]))*B;return A.shards[F][H:H+B+1]
	def gather(B,step):
		D=B.runtime.device.type=='cuda';C=A.empty(B.shape,dtype=A.int32,pin_memory=D)
		for(E,F)in Q(C.numpy(),range(B.share.start,B.share.stop),strict=True):E[:]=B.window(step*B.hp.batch_seqs+F)
		return C
	def batch(A,step):
		B=step
		for C in(B,B+1,B+2):
			if C not in A.pending:A.pending[C]=A.pool.submit(A.gather,C)
		return A.pending.pop(B).result().to(A.runtime.device,non_blocking=True)
class BY(g):loader:AS|None;val_tokens:G.ndarray;token_bytes:AR;facts:list[dict[str,f]]
def BZ(hp,runtime):
	C=runtime;A=hp;H,J,O,P=t(A),0,[],None;Q,R=BW(H),A.train_seq_len;F=Q.vocab_size();A=A2(A,vocab_size=A.vocab_size or F,tokenizer_path=str(H));L=f"tokenizer_path={H} has {F} pieces, not vocab_size";I(F==A.vocab_size,f"{L}={A.vocab_size}: use the tokenizer of that size")
	for M in('val',)if A.evaluate else('train','val'):
		S=BU(K(A.data_path),M);B=[AQ(A)for A in S];T=B[C.rank%D(B)::C.world_size];J=E(J,*(int(A.max())for A in T));U={'shards':D(B),'tokens':sum(map(D,B))};O.append({'split':M,**U,'fingerprint':BV(S)})
		if M=='train':P=AS(B,A,C)
	BX(A,F,C.largest(J));N=G.concatenate(B);L=f"data_path: {D(N)} validation tokens are not more than a window of {R}";I(D(N)>R,f"{L}: prepare more text or lower train_seq_len");return A,BY(P,N,AR(Q,C.device),O)
Ba=tuple[C,C,int]
Bb=tuple[C,C]
def W(function):B=function;C=A3(e(A.compile,B,dynamic=False,fullgraph=True));return wraps(B)(lambda*A,**B:C()(*A,**B))
def o(x):A._dynamo.maybe_mark_dynamic(x,0);return x
class Bc(g):qkv:C;out:C;mlp_up:C;mlp_down:C;resid_mix:C;q_gain:C;xsa:bool
def i(x):return J.rms_norm(x,(x.size(-1),),eps=AJ)
def Bd(hp):B=hp;D,C=B.train_seq_len,B.rope_dims;G=E(1.,D/1024)**(C/E(1,C-2));H=(B.rope_base*G)**-(A.arange(0,C,2).float()/E(1,C));F=A.outer(A.arange(D).float(),H);I=A.zeros(D,B.model_dim//B.num_heads-C);J,K=(A.cat([B*F,F,I],1)for B in(1,-1));return J.cos(),K.sin()
def AT(x,cos,sin,half):D=half;C=sin;B=cos;a,b,E=x.split([D,D,x.size(-1)-2*D],dim=-1);B,C=(A[:,None].to(x.dtype)for A in(B,C));return x*B+A.cat([b,a,E],dim=-1)*C
class Be(A.autograd.Function):
	@z
	def forward(ctx:f,x:C,gain:C,cos:C,sin:C,half:int)->tuple[C,...]:A=gain;C,B=D(A),(x.size(2)-D(A))//2;A=J.pad(A,(0,B),value=1.)[:,None];ctx.save_for_backward(x,A,cos,sin);ctx.half=half;E,F=x.split([C+B,B],dim=2);G,H=(A*AT(i(E),cos,sin,half)).split([C,B],dim=2);return G,H,F
	@z
	def backward(ctx:f,dq:C,dk:C,dv:C)->tuple[C|None,...]:B,E,J,K=ctx.saved_tensors;F=A.promote_types(B.dtype,A.float32);B,C=B[:,:,:D(E)].to(F),A.cat([dq,dk],dim=2);C=AT(C,J,-K,ctx.half).to(F);G=(B.square().mean(-1,keepdim=True)+AJ).rsqrt();H=G*B;I=(C*H).sum(-1,keepdim=True);L=E*G*(C-H*I/B.size(-1));M=I.sum((0,1,3))[:dq.size(2)].to(E.dtype);return A.cat([L.to(dv.dtype),dv],dim=2),M,None,None,None
def Bf(q,k,v):
	if q.device.type=='cpu':k,v=(A.repeat_interleave(q.size(2)//A.size(2),dim=2)for A in(k,v))
	q,k,v=(A.transpose(1,2)for A in(q,k,v));A=q.size(1)!=k.size(1);B=J.scaled_dot_product_attention(q,k,v,is_causal=True,enable_gqa=A);return B.transpose(1,2)
def Bg(y,v):y=y.unflatten(2,(v.size(2),-1));v=J.normalize(v,dim=-1).unsqueeze(3);return(y-(y*v).sum(-1,keepdim=True)*v).flatten(2,3)
def Bh(x,layer,value,rope):
	D=value;A=layer;x=J.linear(x,A.qkv).unflatten(-1,(-1,A.out.size(0)//A.q_gain.numel()));E,F,B=Be.apply(x,A.q_gain,*rope)
	if D is not None:B=B+D[1]*D[0].view_as(B)
	C=Bf(E,F,B);C=Bg(C,B)if A.xsa else C;return J.linear(C.flatten(2),A.out)
def Bi(x,layer):
	A=layer
	if Aa(x.device,x.dtype,A.mlp_up.shape):return Bv.apply(x.flatten(0,1),A.mlp_up,A.mlp_down).view_as(x)
	return J.linear(J.leaky_relu(J.linear(x,A.mlp_up),.5).square(),A.mlp_down)
def AU(x,layer,value,skip,x0,rope):
	B=skip;A=layer
	if B is not None:x=x+B[1]*B[0]
	x=A.resid_mix[0]*x+A.resid_mix[1]*x0;x=x+Bh(i(x),A,value,rope);return x+Bi(i(x),A)
Bj=W(AU)
@W
def Bk(x:C,layers:list,values:list,skips:list,x0:C,rope:Ba,keep:int)->list[C]:A=layers;B=Q(A,values,skips,strict=True);return[(x:=AU(x,*A,x0,rope))for A in B][D(A)-keep:]
def Bl(x,layers,values,skips,x0,rope,keep=1):
	E=values;C=layers;B=skips;B=B+[None]*(D(C)-D(B))
	if A.is_grad_enabled():
		for G in(x,x0,*(A[0]for A in(*E,*B)if A)):o(G)
		return[x,*Bk(x,C,E,B,x0,rope,keep)]
	F=[x.view_as(x)]
	for H in Q(C,E,B,strict=True):F.append(Bj(F[-1],*H,x0,rope))
	return[x,*F[1:]]
def Bm(ids,num_rows):B=num_rows;C=A.bitwise_xor(36313*ids[:,1:],27191*ids[:,:-1])%(B-1);return J.pad(C,(1,0),value=B-1)
@W
def Bn(ids:C,table:C,bigram:tuple[C,...],gate:C,dtype:A.dtype)->C:
	C=bigram;B=dtype;A=J.embedding(ids,table.to(B))
	if C:E,G,H=(A.to(B)for A in C);A=A+H*J.linear(J.embedding(Bm(ids,D(E)),E),G)
	A,F=i(A),gate.sigmoid().to(B);return(1-F)*A+F*J.pad(A,(0,0,1,0))[:,:-1]
@W
def Bo(x:C,targets:C,table:C,softcap:float)->C:C=softcap;B=J.linear(i(x),table.to(x.dtype)).float();B=C*A.tanh(B/C);return J.cross_entropy(B,targets.long(),reduction='none')
class Bp(g):jacobian_proxy:C;growth:C;update:C;feedback:C
def u(x):return A.linalg.vector_norm(x,dim=(1,2),dtype=A.float32)
@W
def Bq(h:C,U:C,V:C,d:C|None)->tuple[C,C]:A=h@V.to(h.dtype)@U.to(h.dtype).T;A=A if d is None else d.to(h.dtype)*A;return A,h+A
@W
def Br(h:C,z:C,core_z:C,scale:C)->C:return h+scale.to(h.dtype)*(core_z-z)
@W
def Bs(h:C,h_next:C,c:C|None)->tuple[C,C]:C=h_next;B=u(h)+1e-06;D=u(C-h)/B;E=A.zeros_like(B)if c is None else u(c)/B;F=A.stack([u(C)/B,D,E]);return J.relu(D-1).square(),F.mean(1).detach()
class Bt(N.Module):
	def __init__(A,hp):super().__init__();A.hp=hp;A.later=hp.max_passes-1;AY(A,AV(hp))
	def forward(B,h,core,num_passes):
		F,G=B.hp.feedback_mode,[]
		for C in range(num_passes):
			if C==0:H,E=None,core(h)
			else:h=i(h)if B.hp.interpass_rmsnorm else h;J=B.d[M(C,D(B.d))-1]if F=='diagonal'else None;H,I=Bq(h,B.U,B.V,J)if F!='none'else(None,h);E=Br(h,I,core(I),B.residual_scale[M(C,B.later)-1])
			G.append(Bs(h,E,H));h=E
		K,L=Q(*G,strict=True);return h,Bp(A.stack(K).sum(0),*A.stack(L).unbind(1))
p,q,A5=N.init.zeros_,N.init.ones_,e(e,N.init.normal_)
def A6(bank):
	for A in bank:N.init.orthogonal_(A)
def v(value):return e(N.init.constant_,val=value)
class H(g):shape:tuple[int,...];group:str;start:Az[[C],f]
def AV(hp):A=hp;B,C,D=A.model_dim,A.max_passes-1,A.feedback_rank;E={'residual_scale':H((C,),'scalar',v(A.residual_scale_init)),'U':H((B,D),'scalar',p),'V':H((B,D),'scalar',lambda w:w.normal_().div_(F.sqrt(B))),'d':H((C if A.per_pass_feedback else 1,B),'scalar',q)};G=A.feedback_mode if C else'none';I={'none':('U','V','d'),'identity':('d',),'diagonal':()}[G];return{A:B for(A,B)in E.items()if A not in I}
def AW(hp):A=hp;C,B,F,G,I=A.num_layers,A.model_dim,A.mlp_dim,A.vocab_size,A.kv_dim;L,J,E=M(A.core_start,C-A.core_end),A.bigram_vocab_size,A.bigram_dim;N={'qo_bank':H((2*C,B,B),'muon',lambda w:A6(w.zero_()[:C])),'kv_bank':H((2*C,I,B),'muon',A6),'mlp_up_bank':H((C,F,B),'muon',A6),'mlp_down_bank':H((C,B,F),'muon',p),'tok_emb':H((G,B),'table',A5(std=A.tied_embed_init_std)),'smear_gate':H((B,),'scalar',p),'resid_mix':H((C,2,B),'scalar',lambda w:w.zero_()[:,0].fill_(1)),'attn_scale':H((C,B),'scalar',q),'mlp_scale':H((C,B),'scalar',q),'q_gain':H((C,A.num_heads),'scalar',v(A.qk_gain_init)),'skip_weight':H((L,B),'scalar',q),'bigram_table':H((J,E),'table',p),'bigram_proj':H((B,E),'projection',A5(std=E**-.5)),'bigram_scale':H((),'scalar',v(.05)),'ve_table':H((G,A.ve_dim),'table',A5(std=.01)),'ve_proj':H((I,A.ve_dim),'projection',p),'ve_scale':H((),'scalar',v(.1)),'ve_layer_scale':H((D(A.ve_layer_ids),),'scalar',q)};K=()if J else('bigram_',);K+=()if A.ve_layer_ids else('ve_',);return{A:B for(A,B)in N.items()if not A.startswith(K)}
def AX(hp):A={f"recurrence.{A}":B for(A,B)in AV(hp).items()};return AW(hp)|A
@A.no_grad()
def AY(module:N.Module,table:Mapping[str,H])->None:
	B=module
	for(C,D)in table.items():B.register_parameter(C,N.Parameter(A.empty(D.shape)));D.start(B.get_parameter(C))
class AZ(N.Module):
	def __init__(B,hp,dtype=A.float32):
		C=hp;super().__init__();B.hp,B.dtype=C,dtype;B.recurrence=Bt(C);AY(B,AW(C));D=dict(Q(('cos','sin'),Bd(C),strict=True));D['ln_scale']=A.arange(1,C.num_layers+1).float().rsqrt()
		for(E,F)in D.items():B.register_buffer(E,F,persistent=False)
	def layers(B,qat_floor):
		F=qat_floor;C,D=B.hp,B.hp.num_layers;G,H=(C.core_start,C.core_end)if C.qat_scope=='core'else(0,D)
		def E(bank):
			B=bank.unflatten(0,(-1,D))
			if F is None:return B
			E,C,I=B.split([G,H-G,D-H],dim=1);J=C1(o(C.flatten(0,2)),F).view_as(C);return A.cat([E,J,I],dim=1)
		(K,out),(L,M)=E(B.qo_bank),E(B.kv_bank);[N],[O]=E(B.mlp_up_bank),E(B.mlp_down_bank);I=B.ln_scale[:,None,None];J=I*A.cat([K,L,M],dim=1),B.attn_scale[...,None]*out;J+=I*N,B.mlp_scale[...,None]*O;P=[A.to(B.dtype).unbind()for A in(*J,B.resid_mix,B.q_gain)];R=[A>=D-C.xsa_last_n and not C.core_start<=A<C.core_end for A in range(D)];return[Bc(*A)for A in Q(*P,R,strict=True)]
	def value_embeddings(A,ids):
		B:list[Bb|None]=[None]*A.hp.num_layers
		if A.hp.ve_layer_ids:
			C=J.embedding(ids,A.ve_table.to(A.dtype))@A.ve_proj.to(A.dtype).T;D=(A.ve_scale*A.ve_layer_scale).to(A.dtype).unbind()
			for(E,F)in Q(A.hp.ve_layer_ids,D,strict=True):B[E]=C,F
		return B
	def forward(A,ids,targets,num_passes,qat_floor=None,score_last=None):
		D=score_last;C=targets;B,I=A.hp,(A.cos,A.sin,A.hp.rope_dims//2);J,K=A.layers(qat_floor),A.value_embeddings(ids);L=('bigram_table','bigram_proj','bigram_scale')if B.bigram_vocab_size else();M=tuple(P(A,B)for B in L);G=Bn(o(ids),A.tok_emb,M,A.smear_gate,A.dtype)
		def E(x,part,skips=(),keep=1):return Bl(x,J[part],K[part],[*skips],G,I,keep)
		N,O=T(B.core_start),T(B.core_start,B.core_end);R=T(B.core_end,B.num_layers);H=E(G,N,keep=B.core_start);S,U=A.recurrence(H[-1],lambda x:E(x,O)[-1],num_passes);V=Q(H[:0:-1],A.skip_weight.to(A.dtype).unbind(),strict=False);F=E(S,R,V)[-1]
		if D:F,C=F[:,-D:],C[:,-D:]
		W=o(F.flatten(0,1)),o(C.flatten());X=Bo(*W,A.tok_emb,B.logit_softcap);return X.view_as(C),U
if triton is not None:
	@triton.jit
	def Bu(a:tl.tensor_descriptor,b:tl.tensor_descriptor,s:tl.tensor_descriptor,out:tl.tensor_descriptor,N:tl.constexpr,K:tl.constexpr,BACKWARD:tl.constexpr)->None:
		B:tl.constexpr=N//128;O=tl.cdiv(out.shape[0],128)*B
		for G in tl.range(tl.program_id(0),O,tl.num_programs(0),flatten=not BACKWARD):
			C,D=G//B*128,G%B*128;E=tl.zeros((128,128),tl.float32)
			for H in range(0,K,64):E=tl.dot(a.load([C,H]),b.load([D,H]).T,E)
			P,Q=E.reshape(128,2,64).permute(0,2,1).split()
			for F in tl.static_range(2):
				A=P if F==0 else Q
				if BACKWARD:I=s.load([C,D+64*F]);R=I.to(tl.int16,bitcast=True)&1==1;J=A*tl.where(R,-1,2)*tl.sqrt(I.to(tl.float32))
				else:L=tl.where(A<0,.5*A,A);M=tl.minimum((L*L).to(tl.int32,bitcast=True),2143289344);S,T=M+65536&-131072,M&-131072|65536;J=tl.where(A<0,T,S).to(tl.float32,bitcast=True)
				out.store([C,D+64*F],J.to(out.dtype))
	@library.custom_op('train_gpt::fused_product',mutates_args=())
	def A7(a:C,b:C,s:C|None)->C:out=a.new_empty(a.size(0),b.size(0));B=2*A.cuda.get_device_properties(a.device).multi_processor_count;C=[A.contiguous()for A in(a,b,out if s is None else s,out)];D=[B8.from_tensor(A,[128,64])for A in C];Bu[B,](*D,*b.shape,s is not None);return out
	A7.register_fake(lambda a,b,s:a.new_empty(a.size(0),b.size(0)))
class Bv(A.autograd.Function):
	@z
	def forward(ctx:f,x:C,up:C,down:C)->C:s=A7(x,up,None);ctx.save_for_backward(x,up,down,s);return J.linear(s,down)
	@z
	def backward(ctx:f,dy:C)->tuple[C,...]:B,C,D,s=ctx.saved_tensors;A=A7(dy,D.T,s);return A@C,A.T@B,dy.T@s
def Aa(device,dtype,up_shape):C=up_shape;B=device;D=dtype==A.bfloat16 and C[0]%128==0==C[1]%64;E=B.type=='cuda'and A.version.hip is None and triton is not None;return D and E and A.cuda.get_device_capability(B)[0]==9
class Ab:
	ALIGNMENT=64
	def __init__(B,model,world_size=1):
		H=model;C,K=dict(H.named_parameters()),AX(H.hp);B.shapes={A:B.shape for(A,B)in C.items()};(B.places):dict[str,T]={};(B.spans):dict[str,T]={};E=0
		for I in(*U,*AK):
			L=E
			for D in[A for A in C if I in(A,K[A].group)]:
				B.places[D]=T(E,E+C[D].numel());J=B.ALIGNMENT
				if I in U:J=world_size*F.lcm(C[D][0].numel(),B.ALIGNMENT)
				E+=F.ceil(C[D].numel()/J)*J
			B.spans[I]=T(L,E)
		assert k(B.places)==k(C),'every parameter is optimized exactly once';B.banks_end=B.spans['table'].start;B.data,B.grad=A.zeros(2,E,device=H.tok_emb.device).unbind()
		for(D,G)in C.items():G.data=B.data[B.places[D]].view(G.shape).copy_(G.data);G.grad=B.grad[B.places[D]].view(G.shape)
	def shard(A,flat,bank,runtime):B=runtime;C=flat[A.spans[bank]].view(-1,*A.shapes[bank][1:]);return C.chunk(B.world_size)[B.rank]
	def gather(A,flat,bank,runtime):B=A.shard(flat,bank,runtime).view(-1);return R.all_gather_into_tensor(flat[A.spans[bank]],B,async_op=True)
	def named(A,flat):B={B:A for(B,A)in A.places.items()if A.stop<=D(flat)};return{A:flat[B[A]].view(C)for(A,C)in A.shapes.items()if A in B}
	def whole(A,span):B=N.Parameter(A.data[span]);B.grad=A.grad[span];return B
def Bw(g,steps,dtype):
	a,b,E=BH;D=g.size(-2)>g.size(-1);B=(g.mT if D else g).to(dtype);B=B/(B.norm(dim=(-2,-1),keepdim=True)+1e-07)
	for F in range(steps):C=B@B.mT;B=A.baddbmm(B,A.baddbmm(C,C,C,beta=b,alpha=E),B,beta=a)
	return B.mT if D else B
class Ac:
	def __init__(D,flat,hp,runtime):
		E=runtime;C=hp;B=flat;D.flat,D.hp,D.runtime=B,C,E;D.momentum=A.zeros_like(B.data[:B.banks_end]);D.bank_grads={A:B.shard(B.grad,A,E)for A in U};D.rest=B.grad[B.banks_end:];F={'table':(C.tied_embed_lr,C.adam_wd),'projection':(C.scalar_lr,C.adam_wd)};F['scalar']=C.scalar_lr,.0;G=[]
		for H in AK:I,J=F[H];K=B.whole(B.spans[H]);G.append({'params':[K],'base_lr':I,'weight_decay':J})
		L=C.beta1,C.beta2;D.adam=A.optim.AdamW(G,lr=.0,betas=L,eps=C.adam_eps,fused=True)
	def reduce(B):
		C,D=B.flat,B.runtime
		if D.world_size>1:
			E=[]
			for F in U:G=C.shard(B.momentum,F,D);B.bank_grads[F]=H=A.empty_like(G);I=C.grad[C.spans[F]];E.append(R.reduce_scatter_tensor(H.view(-1),I,async_op=True))
			E.append(R.all_reduce(B.rest,async_op=True))
			for J in E:J.wait()
		K=A.stack([A.square().sum()for A in B.bank_grads.values()]).sum();return(D.sum_(K)+B.rest.square().sum()).sqrt()
	@A.no_grad()
	def step(self,norm:C,lr_scale:float,momentum:float)->None:
		C=lr_scale;A=self;D=[];E=(A.hp.grad_clip_norm/(norm+1e-06)).clamp(max=1.)
		for B in U:
			A.update_rows(B,A.bank_grads[B]*E,C,momentum)
			if A.runtime.world_size>1:D.append(A.flat.gather(A.flat.data,B,A.runtime))
		A.rest.mul_(E)
		for F in A.adam.param_groups:F['lr']=F['base_lr']*C
		A.adam.step()
		for G in D:G.wait()
	def update_rows(B,bank,grad,lr_scale,momentum):H=momentum;C=grad;G,I=B.hp,B.hp.matrix_lr*lr_scale;D=B.flat.shard(B.flat.data,bank,B.runtime);K=B.flat.shard(B.momentum,bank,B.runtime).mul_(H).add_(C);L=A.bfloat16 if D.is_cuda else A.float32;C=C.add_(K,alpha=H);C=J.normalize(C,dim=-1,eps=1e-07)if G.muon_row_norm else C;M=Bw(C,G.muon_backend_steps,L);N=F.sqrt(E(1.,D.size(-2)/D.size(-1)));D.mul_(1-I*G.muon_wd).add_(M,alpha=-I*N)
class Bx:
	def __init__(B,hp,weights):C=weights;B.hp,B.weights=hp,C;B.ema=C.clone()if'ema'in hp.weight_average else None;B.swa=A.zeros_like(C)if'swa'in hp.weight_average else None;B.samples,B.last_progress,B.last_sample=0,.0,-1.
	def update(A,progress,swa):
		B=progress;C,A.last_progress=B-A.last_progress,B
		if A.ema is not None:A.ema.lerp_(A.weights,-F.expm1(-C/A.hp.ema_frac))
		if A.swa is not None and swa and B-A.last_sample>=A.hp.swa_frac:A.samples,A.last_sample=A.samples+1,B;A.swa.lerp_(A.weights if A.ema is None else A.ema,1/A.samples)
	def result(A):return A.swa if A.samples else A.weights if A.ema is None else A.ema
class Ad(g):num_passes:int;qat:bool;swa:bool;lr_scale:float;momentum:float
def A8(hp,step,progress):B=progress;A=hp;G=[C for(A,C)in A.growth if A<=(step if X(A,int)else B)];C=M(1.,E(.0,1-B)/A.warmdown_frac);F=M(1.,B/A.muon_momentum_warmup_frac);D=(1-F)*A.muon_momentum_warmup_start+F*A.muon_momentum;H=1-B/E(1,step)/A.muon_momentum_frac;D=M(D,E(BI,H));I,J=C<A.late_qat_threshold,C<A.swa_lr_scale;return Ad(G[-1],I,J,C,D)
def w():return A._dynamo.utils.counters['stats']['unique_graphs']
class By:
	def __init__(A,trainer):B=trainer;A.hp,A.runtime,A.interrupts=B.hp,B.runtime,B.interrupts;A.queued=int(B.runtime.device.type=='cuda');A.cap=A.hp.max_wallclock_seconds or F.inf;A.last_progress=B.average.last_progress;A.recent=deque([.0],maxlen=16);A.runtime.barrier();A.last=A.last_checkpoint=L.perf_counter();A.started=A.last-B.elapsed
	def elapsed(A):return L.perf_counter()-A.started
	def read(B,step):C,H=L.perf_counter(),B.hp.iterations;J,B.last=C-B.last,C;B.recent.append(J);D=B.elapsed()+B.queued*J;I=D>=B.cap or D+E(B.recent)>B.cap;K=B.hp.checkpoint_seconds or F.inf;G=C-B.last_checkpoint>=K and B.cap-D>=K;N=[float(A)*B.runtime.is_main for A in(D/B.cap,I,G)];N.append(B.interrupts.noted);O,I,G,P=B.runtime.sum_(A.tensor(N).double()).tolist();B.last_checkpoint=C if G else B.last_checkpoint;Q=.0 if H is None else step/H if H else 1.;B.last_progress=E(B.last_progress,M(O,1.),Q);return 1. if I or P else B.last_progress,G>0
	def fields(B,step):A=1000*B.elapsed();return{'train_time':f"{A:.0f}ms",'step_avg':f"{A/E(1,step):.2f}ms"}
def Ae(rows,hp):A=F.ceil(D(rows)/(hp.micro_batch_tokens//hp.train_seq_len));return list(rows.tensor_split(A))if A else[]
class Bz:
	def __init__(B,model,data,runtime,log,interrupts):E=runtime;D=model;B.hp,B.model,B.data,B.runtime=D.hp,D,data,E;B.log,B.interrupts=log,interrupts;B.flat=Ab(D,E.world_size);B.optimizer=Ac(B.flat,B.hp,E);B.average=Bx(B.hp,B.flat.data);B.step,B.elapsed=0,.0;(B.plan):Ad|None=None;B.phase_start=0;(B.floor_index):int|None=None;(B.norm_before):tuple[C,A.cuda.Event|None]|None=None
	def accumulate(B,batch,passes,floor):
		F=passes;C=B.hp;G=A.zeros(3+3*F,device=B.runtime.device)
		for E in Ae(batch,C):H,I=E[:,:-1],E[:,1:];M,J=B.model(H,I,F,floor);K,L=M.sum(),J.jacobian_proxy.sum();N=C.jacobian_proxy_weight*L/C.batch_seqs;(K/C.train_batch_tokens+N).backward();O=B.data.token_bytes.of(H,I).sum();P=A.stack([K.detach(),O,L.detach()]);G+=A.cat([P,D(E)*A.cat(J[1:])])
		return G
	def warm_up(C):
		B,H,F,N=C.hp,C.flat,C.runtime,C.flat.data.clone();O=A.Generator().manual_seed(B.seed);J=e(A.randint,B.vocab_size,generator=O,dtype=A.int32);K,P=Ac(H,B,F),A.ones((),device=F.device);L=r({A for(B,A)in B.growth});Q=(None,P)if B.late_qat_threshold>0 else(None,);I=[(A,B)for A in L for B in Q];G=E(B.warmup_steps,D(I))if B.warmup_steps else 0
		for M in range(G):C.log.progress(f"warm-up: step {M+1} of {G}");R=J(C.data.loader.shape).to(F.device);C.accumulate(R,*I[M*D(I)//G]);K.step(K.reduce(),1.,.9);H.grad.zero_()
		if G and F.compiles:S=J((B.ttt_chunk_tokens+2*B.train_seq_len,)).numpy();T=An(B,S,C.data.token_bytes,F,AP(None));T.run_all(copy.deepcopy(C.model),L[-1])
		H.data.copy_(N)
	def train(B,evaluator,checkpoints,until=1.):
		D,E,C,I=B.hp,B.log,By(B),w();E.has_results=True
		while True:
			F,J=C.read(B.step)
			if F>=until:break
			if J:B.elapsed=C.elapsed();Aj(B,checkpoints);C.last=L.perf_counter()
			K,M=B.take_step(F)
			if B.step%D.train_log_every==0 or B.step in(1,10):B.log_step(K,M,C)
			if D.val_loss_every and B.step%D.val_loss_every==0:B.runtime.barrier();N,O=L.perf_counter(),B.plan.num_passes;evaluator.run('validation',B.model,D.train_seq_len,O,step=B.step);C.started+=L.perf_counter()-N;C.last=L.perf_counter()
			E.progress(f"{F:4.0%} step {B.step}, {B.plan.num_passes} passes")
		B.check_norm(None);B.runtime.barrier();B.elapsed,G=C.elapsed(),B.runtime.largest(B.interrupts.noted)>0;P,Q=B.runtime.device.type=='cuda',w()-I;R=A.cuda.max_memory_allocated()>>20 if P else 0;H={'graphs_compiled_after_start':Q,'peak_memory_mib':R};H['interrupted']=int(G);E.event('stop',step=B.step,**C.fields(B.step),**H);return G
	def take_step(B,progress):
		E=progress;D,C=B.plan,A8(B.hp,B.step,E);B.plan,F=C,{'step':B.step,'progress':E}
		if D is None or C.num_passes!=D.num_passes:B.phase_start=B.step;B.log.event('progressive_passes',**F,num_passes=C.num_passes)
		if C.swa and not(D and D.swa)and B.average.swa is not None:B.log.event('swa',**F)
		if C.qat and B.floor_index is None:J=Al(B.flat.named(B.flat.data),Ap(B.hp));B.floor_index=H=B.runtime.from_main(J);B.log.event('late_qat',**F,floor_index=H,floor=h(H))
		I=None
		if C.qat:I=A.full((),h(B.floor_index),device=B.runtime.device)
		K=B.accumulate(B.data.loader.batch(B.step),C.num_passes,I);G=B.optimizer.reduce();B.optimizer.step(G,C.lr_scale,C.momentum);B.flat.grad.zero_();B.average.update(E,C.swa);B.step+=1;B.check_norm(G);return K,G
	def check_norm(B,norm):
		C=norm
		if B.norm_before is not None:
			E,D=B.norm_before
			if D is not None:D.synchronize()
			if not F.isfinite(E):G=B.step-(C is not None);H=f"step {G}: the gradient's norm is {E.item()}, the run diverged";raise Ax(f"{H}: lower matrix_lr or residual_scale_init")
		B.norm_before=None
		if C is not None:I=C.detach().to('cpu',non_blocking=True);D=A.cuda.current_stream().record_event()if C.is_cuda else None;B.norm_before=I,D
	def log_step(B,sums,norm,clock):C,D,H=B.hp,B.plan,B.step;J,K,L,*I=B.runtime.sum_(sums).tolist();I=(G.array(I).reshape(3,-1)/C.batch_seqs).tolist();A={'step':f"{H}/{C.iterations}"if C.iterations else H};A['train_loss']=f"{J/C.train_batch_tokens:.4f}";A['train_bpb']=f"{J/F.log(2)/E(1,K):.4f}";A|={'jacobian_proxy':L/C.batch_seqs,'grad_norm':norm.item()};A|={'lr_scale':D.lr_scale,'passes':D.num_passes,'qat':int(D.qat)};A|=Q(('growth','update','feedback_norm'),I,strict=True);A['residual_scale']=B.model.recurrence.residual_scale.tolist();B.log.event(**A,**clock.fields(H))
	def average_weights(A):
		E,B=A.average,A.plan or A8(A.hp,0,.0);A.log.event('weight_average',kind=A.hp.weight_average,swa_samples=E.samples);A.flat.data.copy_(E.result());C,B=A.hp.eval_passes or B.num_passes,B.num_passes;F=A.step-A.phase_start
		if C>B:D=f"scored with {C} passes, training reached {B}";A.log.event('warning',text=D)
		elif A.phase_start and F<A.step/100:D=f"only the last {F} of {A.step} steps had {B} passes";A.log.event('warning',text=D)
		return C
def Af(trainer):A=trainer;B,C=A.hp,('seed','train_batch_tokens','shuffle','weight_average');D=B.architecture()|{A:P(B,A)for A in C};return D|{'eval_passes':None,'data':A.data.facts[0]['fingerprint']}
def Ag(trainer):A=trainer;B={'data':A.flat.data,'momentum':A.optimizer.momentum};B|={'ema':A.average.ema,'swa':A.average.swa};return{B:A for(B,A)in B.items()if A is not None}
Ah='step','elapsed','phase_start','floor_index'
Ai='samples','last_progress','last_sample'
def Aj(trainer,folder):
	E=folder;B=trainer;I,C,J=B.flat,B.runtime,B.optimizer.momentum
	if C.world_size>1:
		for K in[I.gather(J,A,C)for A in U]:K.wait()
	if not C.is_main:return C.from_main(None)
	F={A:P(B,A)for A in Ah};F|={A:P(B.average,A)for A in Ai};F|={'settings':Af(B),'adam':B.optimizer.adam.state_dict()};L=Ag(B).items();F['tensors']={A:I.named(B.to('cpu',copy=True))for(A,B)in L};A.save(F,(M:=io.BytesIO()));G,H=E/f"step_{B.step:08d}.pt",M.getvalue()
	try:
		E.mkdir(parents=True,exist_ok=True);AB(G,m.sha256(H).digest()+H);N=r(E.glob('step_*.pt'),key=lambda other:(other<=G,other))
		for O in(*N[:-2],*E.glob('step_*.tmp')):O.unlink()
	except S as Q:B.log.event('checkpoint_failed',path=G,reason=Q.strerror);return C.from_main(False)
	B.log.event('checkpoint',step=B.step,path=G,bytes=32+D(H));return C.from_main(True)
def B_(folder,runtime,log):
	B=runtime
	for D in B.from_main(r(folder.glob('step_*.pt'),reverse=True)):
		C=B.from_main(D.read_bytes()if B.is_main else None)
		if m.sha256(C[32:]).digest()==C[:32]:return A.load(io.BytesIO(C[32:]),map_location='cpu',weights_only=True)
		log.event('checkpoint_damaged',path=D)
def C0(trainer,folder):
	A=trainer;B=B_(folder,A.runtime,A.log)
	if B is None:return
	D,E,F=Af(A),B['settings'],A.optimizer.adam;G=[f"{A}={D.get(A)} (was {E.get(A)})"for A in D|E if D.get(A)!=E.get(A)];I(not G,f"resume: the checkpoint is of another run: {', '.join(G)}")
	for(H,J)in Ag(A).items():
		for(C,K)in A.flat.named(J).items():K.copy_(B['tensors'][H][C])
	F.load_state_dict(F.state_dict()|{'state':B['adam']['state']})
	for(L,M)in((A,Ah),(A.average,Ai)):
		for C in M:setattr(L,C,B[C])
	A.plan=A8(A.hp,A.step-1,A.average.last_progress);N=f"{1000*A.elapsed:.0f}ms";A.log.event('resume',step=A.step,train_time=N)
def A9(w,levels,floor):
	J=levels;K=[(1-A)*(w.size(-1)-1)for A in BJ];G=w.abs().topk(M(w.size(-1),2+int(E(K)))).values;C=B=None
	for H in K:L,N=int(H),M(int(H)+1,G.size(-1)-1);O=A.lerp(G[...,L,None],G[...,N,None],H-L);D=A.maximum(O/J,floor).half().float();I=(x(w,D,J)*D-w).square().sum(-1,keepdim=True);P=I<(F.inf if B is None else B);C=D if C is None else A.where(P,D,C);B=I if B is None else A.minimum(I,B)
	return C
def x(w,scale,levels):B=levels;return A.round(w/scale).clamp(-B,B)
@W
def C1(w:C,floor:C)->C:
	with A.no_grad():B=A9(w,V,floor);C=x(w,B,V)*B
	return C+(w-w.detach())
def h(index):return 2.**(-index/BM)
def AA(name,shape):A=shape;B=D(A)==2 and F.prod(A)>BL;return V if name in U else BK if B else 0
def Ak(shapes):
	B=0
	for(D,A)in shapes.items():C,E=F.prod(A),F.prod(A[:-1]);B+=C+2*E if AA(D,A)else 2*C
	return B
def C2(tensors,floor):
	D=[]
	for(F,B)in tensors.items():
		C=AA(F,B.shape)
		if C:G=floor if C==V else h(A4);E=A9(B,C,A.tensor(G,device=B.device));D+=[E.half(),(x(B,E,C)+C).to(A.uint8)]
		else:D.append(B.half())
	return b''.join(A.cpu().numpy().tobytes()for A in D)
def C3(payload,shapes):
	D,I={},io.BytesIO(payload)
	def E(dtype,shape):C=shape;B=dtype;D=G.frombuffer(I.read(F.prod(C)*G.dtype(B).itemsize),B);return A.from_numpy(D.astype(G.float32)).reshape(tuple(C))
	for(H,B)in shapes.items():C=AA(H,B);J=E(G.float16,(*B[:-1],1))if C else 1.;D[H]=(E(G.uint8 if C else G.float16,B)-C)*J
	return D
def C4(header,tensors,floor_index):A=A1.dumps(header,separators=(',',':')).encode();B=AL+AE.pack('<I',D(A))+A;C=C2(tensors,h(floor_index));return d.compress(B+C,format=d.FORMAT_XZ,filters=BN)
def C5(tensors,floor):
	C=tensors;D=float(Ak({A:B.shape for(A,B)in C.items()}))
	for B in(C[A]for A in U):E=A9(B,V,A.tensor(floor,device=B.device));G=(x(B,E,V)+V).to(A.uint8).flatten();H=A.bincount(G,minlength=2*V+1).double()/B.numel();I=A.special.entr(H).sum().item()/F.log(2);D-=B.numel()*(1-1.01*I/8)
	return D
def Al(tensors,limit_bytes):A=range(A4+1);B=lambda i:C5(tensors,h(i))>limit_bytes;return E(0,AC.bisect_left(A,True,key=B)-1)
def C6(size_of,guess,limit,log):
	G=limit;A,B=-1,A4+1;C={guess+A for A in(-64,-24,-8,0,8,24,64)}
	with AF(Z.cpu_count())as H:
		while B-A>1:
			C=r({M(E(C,A+1),B-1)for C in C})
			for(D,F)in Q(C,H.map(size_of,C),strict=True):log.event('export_probe',floor_index=D,artifact_bytes=F);A=E(A,D)if F<=G else A;B=M(B,D)if F>G else B
			C={A+(B-A)*C//8 for C in range(1,8)}
	return A if A>=0 else None
def C7(hp,tensors,path,log):J=tensors;E=log;B=path;F,G=Ap(hp),A3(e(C4,hp.architecture(),J));L=Al(J,F);A=C6(lambda index:D(G(index)),L,F,E);K,A=A is not None,A or 0;B=Aq(B if K else B.with_suffix('.oversize.xz'),G(A),E);H,C=Ao(),D(G(A));M={'code_bytes':H,'model_bytes':C,'total_bytes':H+C};N={'floor_index':A,'floor':h(A)};E.event('artifact',path=B,**M,margin_bytes=F-C,**N);O=f"artifact_limit_bytes={hp.artifact_limit_bytes}: code and model need {H+C}";I(K,f"{O} at the coarsest setting, kept as {B}: make the model smaller");return B
def Am(path):
	B=path;A=d.LZMADecompressor(d.FORMAT_XZ,memlimit=1<<26)
	def C(size,data=b''):
		C=size;B=A.decompress(data,C)
		while D(B)<C and not A.eof and not A.needs_input:B+=A.decompress(b'',C-D(B))
		I(D(B)==C,'it ends early');return B
	try:K,G=AE.unpack('<4sI',C(8,B.read_bytes()));I(K==AL and G<1<<16,'it does not begin like an artifact');H=C8(C(G));J={A:B.shape for(A,B)in AX(H).items()};E=Ak(J);I(E<=BO,f"it claims {E} bytes of weights");L=C(E);M=b''if A.eof else A.decompress(b'',1);I(A.eof and not M and not A.unused_data,'it has too many bytes')
	except S as F:raise O(f"artifact {B} cannot be read: {F.strerror}")from None
	except(d.LZMAError,EOFError,j,Aw,OverflowError)as F:N=f"artifact {B} is damaged or foreign ({F}): copy or export it again";raise O(N)from None
	return H,C3(L,J)
def C8(text):A,D=A1.loads(text),c().architecture();I(X(A,dict)and k(A)==k(D),'its header is another one');B=A['train_seq_len'];E={'train_batch_tokens':B,'micro_batch_tokens':B,'eval_stride':1};F={A.upper():str(B)for(A,B)in(A|E).items()};C,G=AM(F,[]);I(C.vocab_size is not None,'its header has no vocabulary');return C
def C9(first,last,seq_len,stride):F=stride;D=seq_len;C=first;A=last;H=M(A,E(C+F,D));B=G.array([*range(H,A,F),A],dtype=G.int64);return G.stack([G.maximum(B-D,0),G.append(C,B[:-1]),B],axis=1)
class An:
	def __init__(B,hp,tokens,token_bytes,runtime,log):E=runtime;C=tokens;B.hp,B.runtime,B.log=hp,E,log;B.tokens=A.from_numpy(C.astype(G.int32)).to(E.device);B.num_targets=D(C)-1;B.bytes=token_bytes.of(B.tokens[:-1],B.tokens[1:])
	@A.no_grad()
	def score(self,model:AZ,targets:range,stride:int,passes:int,name:str|None=None)->C:
		L=stride;F=targets;B=self;C,H,I=B.hp.train_seq_len,B.hp.eval_batch_seqs,B.runtime.device;J=A.zeros(D(F)+1,device=I);M=A.zeros_like(J,dtype=A.int32);R=C9(F.start,F.stop,C,L);K=R[B.runtime.share(D(R))];S=K[:,1]>=K[:,0]+C-L
		for(N,T)in((K[S],L),(K[~S],C)):
			for O in range(0,D(N),H):
				U=N[O:O+H];X=G.pad(U,((0,H-D(U)),(0,0)));V,Y,Z=A.from_numpy(X).to(I).unsqueeze(2).unbind(1);W=B.tokens[V+A.arange(C+1,device=I)];a,d=model(W[:,:-1],W[:,1:],passes,score_last=T);P=V+A.arange(C-T,C,device=I);b=(P>=Y)&(P<Z);Q=A.where(b,P-F.start,D(F)).flatten();J.index_copy_(0,Q,a.flatten());M.index_add_(0,Q,A.ones_like(Q,dtype=A.int32))
				if name:B.log.progress(f"{name} {(O+H)/E(H,D(N)):4.0%}")
		for c in(J,M):B.runtime.sum_(c)
		if not bool((M[:-1]==1).all()):raise Av('a target was not scored exactly once: this is a fault of scoring')
		return J[:-1]
	def bits_per_byte(B,losses):A=losses;return A.double().sum().item()/F.log(2)/int(B.bytes[:D(A)].sum())
	def report(A,name,losses,since,**E):B=losses;F,G=B.double().sum().item()/D(B),A.bits_per_byte(B);C={'val_loss':f"{F:.8f}",'val_bpb':f"{G:.8f}",'tokens':D(B)};C|={'bytes':int(A.bytes.sum()),'seconds':f"{L.perf_counter()-since:.3f}"};A.log.event(name,**C,**E);A.log.has_results=True
	def run(A,name,model,stride,passes,**D):B=passes;E=L.perf_counter();C=A.score(model,range(A.num_targets),stride,B,name);A.report(name,C,E,passes=B,**D);return C
	def run_all(A,model,passes):
		D=passes;C=model;B,G=A.hp,L.perf_counter()+(A.hp.eval_wallclock_seconds or F.inf);E=A.run('final_int6_roundtrip_exact',C,B.train_seq_len,D)
		if B.sliding_eval:E=A.run('final_int6_sliding_window_exact',C,B.eval_stride,D)
		if B.ttt_enabled:E=A.run_ttt(C,D,G)
		return E
	def run_ttt(B,model,passes,deadline):
		R=passes;Q=model;C,X,S=B.hp,Ab(Q),L.perf_counter();Y=A.optim.SGD([X.whole(T(None))],C.ttt_lr,C.ttt_momentum);G=range(0,B.num_targets,C.ttt_chunk_tokens);K=A.zeros(B.num_targets,device=B.tokens.device);J,N,U,O=S,.0,.0,0
		for(H,V)in enumerate(G):
			P=range(V,M(V+C.ttt_chunk_tokens,B.num_targets));K[V:P.stop]=B.score(Q,P,C.eval_stride,R)
			if(H+1)%E(1,D(G)//20)==0:Z,a=B.bits_per_byte(K[:P.stop]),f"{H+1}/{D(G)}";b=f"{L.perf_counter()-S:.1f}s";B.log.event('ttt_chunk',chunk=a,val_bpb=Z,time=b)
			J,N=B.lap(J,N);c=U/O if O else N*3*C.eval_stride/C.train_seq_len;W=D(G)-H-1;d=.95*(deadline-J-W*N/(H+1));I=int(M(E(d/E(W*c,1e-09),0),C.ttt_epochs))if W else 0;I=B.runtime.from_main(I);e=.5*(1+F.cos(F.pi*H/E(1,D(G)-1)));Y.param_groups[0]['lr']=C.ttt_lr*e;B.train_on(Q,X,Y,P,R,I);J,U=B.lap(J,U);O+=I;B.log.progress(f"legal_ttt {H+1}/{D(G)} chunks")
		I=f"{O}/{C.ttt_epochs*(D(G)-1)}";B.report('legal_ttt_exact',K,S,passes=R,epochs=I);return K
	def lap(B,mark,spent):B.runtime.barrier();A=L.perf_counter();return A,spent+A-mark
	def train_on(B,model,flat,sgd,targets,passes,epochs):
		H=targets;E=flat;F,C=B.hp,B.hp.train_seq_len;K=range(H.start,H.stop-C+1,C);L=A.tensor(K,dtype=A.int64,device=B.tokens.device)
		for G in list(L.split(F.ttt_batch_seqs))*epochs:
			M=G[B.runtime.share(D(G))]
			for I in Ae(M,F):J=B.tokens[I[:,None]+A.arange(C+1,device=I.device)];N,P=model(J[:,:-1],J[:,1:],passes);(N.sum()/(D(G)*C)).backward()
			O=B.runtime.sum_(E.grad).norm();E.grad.mul_((F.ttt_grad_clip/(O+1e-06)).clamp(max=1.));sgd.step();E.grad.zero_()
class CA(g):log:K;artifact:K;checkpoints:K
def CB(hp,runtime):
	D=runtime;E=D.from_main(hp.run_id or f"{L.strftime('%Y%m%d_%H%M%S')}_seed{hp.seed}");F='.txt','.int6.xz','.checkpoints';A=CA(*(K(hp.output_dir)/f"{E}{A}"for A in F));G=A[1:2]if hp.resume else A;C=D.from_main([A for A in G if A.exists()]);B='choose another run_id'
	if A.artifact in C:B=f"score it again with --evaluate {A.artifact}, or {B}"
	elif{A.log,A.checkpoints}<=k(C):B=f"go on from its checkpoint with --resume, or {B}"
	H=f"run_id: {', '.join(map(str,C))} would be overwritten";I(not C,f"{H}: {B}");return A
def CC(hp):A=hp;B,C=K(A.output_dir).absolute(),K(A.token_losses or'losses.npy');F=next(A for A in(B,*B.parents)if A.exists());D=0 if A.evaluate else A.artifact_limit_bytes;G='run data/download_fineweb.py or data/prepare_text.py, or set DATA_PATH';H=[(K(A.data_path).is_dir(),f"data_path={A.data_path} is no folder: {G}"),(t(A).is_file(),f"tokenizer_path={t(A)} is missing: set it"),(C.parent.is_dir()and not C.is_dir(),f"token_losses={C} can be no file"),(shutil.disk_usage(F).free>D,f"output_dir={B}: less than {D} bytes free")];E=[B for(A,B)in H if not A];I(not E,'\n'.join(E))
def Ao():return K(__file__).stat().st_size
def Ap(hp):return hp.artifact_limit_bytes-Ao()
def AB(path,data):
	A=path;B=A.with_name(A.name+'.tmp')
	try:B.write_bytes(data);B.replace(A)
	except S:B.unlink(missing_ok=True);raise
def Aq(path,data,log):
	A=path
	with s(S):AB(A,data);return A
	B=K(Ay.mkdtemp(prefix='train_gpt_'))/A.name;C=f"{A} cannot be written, {B} is instead";log.event('warning',text=C);y(f"warning: {C}",file=b.stderr);AB(B,data);return B
def CD(hp,sources,runtime,log):
	E=runtime;C=log;B=hp;H=K(__file__).read_bytes();L=m.sha256(H).hexdigest();C.event('code',name=K(__file__).name,bytes=D(H),sha256=L);I={'torch':A.__version__,'cuda':A.version.cuda,'numpy':G.__version__};I|={'sentencepiece':AH.__version__,'triton':P(triton,'__version__',None)};C.event('versions',python=AD.python_version(),**I);J=E.device.type=='cuda';M=A.cuda.get_device_name()if J else f"{AD.machine()} x{Z.cpu_count()}";C.event('device',name=M,world_size=E.world_size,dtype=str(E.dtype)[6:])
	for F in n(B):C.event('config',name=F.name,value=str(P(B,F.name)),source=sources[F.name])
	if not J and not B.evaluate and B.model_dim*B.num_layers>4096:N='a model of this size takes minutes a step on a CPU: --env scripts/demo.env is small';C.event('warning',text=N)
def Ar(hp,runtime,log):
	B=runtime;A._dynamo.config.recompile_limit=128
	if hasattr(A._inductor.config.triton,'mix_order_reduction'):A._inductor.config.triton.mix_order_reduction=False
	A.manual_seed(hp.seed);C=AZ(hp,B.dtype).to(B.device);D={'parameters':sum(A.numel()for A in C.parameters())};E=Aa(B.device,B.dtype,C.mlp_up_bank.shape[1:]);D|={'fused_mlp':int(E),'compile':'on'if B.compiles else'off'};log.event('model',**D);return C
def As(hp,stored):A=stored;B=A.train_seq_len;C={'train_batch_tokens':B,'micro_batch_tokens':E(B,hp.micro_batch_tokens)};C['eval_stride']=M(B,hp.eval_stride);C['eval_passes']=hp.eval_passes or A.eval_passes;return A2(hp,**A.architecture()|C)
def CE(hp,artifact,runtime,log):A=runtime;C,D=A.from_main(Am(artifact)if A.is_main else None);B=Ar(As(hp,C),A,log);B.load_state_dict(D);return B
def CF(trainer,evaluator,files):
	F=evaluator;B=files;A=trainer;D,C,J=A.hp,A.log,A.runtime
	if D.resume:C0(A,B.checkpoints)
	A.warm_up();C.phase('warm_up');G=D.on_signal=='checkpoint';K='writes a checkpoint and ends'if G else'exports and scores what it has'
	with A.interrupts.deferred(f"the run {K}; a second signal ends it at once"):
		H=A.train(F,B.checkpoints);C.phase('training')
		if H and G and Aj(A,B.checkpoints):return AI,B.artifact
		I=A.average_weights();F.run('pre_quant_exact',A.model,D.train_seq_len,I);C.phase('pre_quant_evaluation');E,L=B.artifact,A.flat.named(A.flat.data)
		if J.is_main:E=C7(A2(D,eval_passes=I),L,E,C)
		C.phase('export')
	return BB if H else 0,E
def CG(hp,sources,runtime,stop):
	I=sources;C=runtime;A=hp;CC(A);D=CB(A,C)
	if A.evaluate:N=Am(K(A.evaluate))[0]if C.is_main else None;A=As(A,C.from_main(N));I|=dict.fromkeys(A.architecture(),'artifact')
	A,E=BZ(A,C);B=AP(D.log if C.is_main else None,A.resume)
	try:
		B.event('run',run_id=D.log.stem,started=L.strftime('%Y%m%d_%H%M%S'));CD(A,I,C,B)
		for O in E.facts:B.event('data',**O)
		B.phase('start');J=An(A,E.val_tokens,E.token_bytes,C,B);H,M=0,K(A.evaluate or D.artifact)
		if not A.evaluate:F=Ar(A,C,B);P=Bz(F,E,C,B,stop);H,M=CF(P,J,D)
		if H!=AI:
			Q=w();F=CE(A,M,C,B);R=J.run_all(F,F.hp.eval_passes);B.event('evaluated',graphs_compiled=w()-Q);B.phase('evaluation')
			if A.token_losses and C.is_main:G.save((S:=io.BytesIO()),R.cpu().numpy());Aq(K(A.token_losses),S.getvalue(),B)
		return H
	except BaseException as T:B.abandon(T);raise
def CH():
	A,B=None,BT();B.install()
	try:
		C,E=AM(Z.environ,b.argv[1:]);A=AN.start(C)
		with B6([P(B5,A)for A in BG],set_priority=True):F=CG(C,E,A,B)
		A.barrier();return F
	except(O,Ax)as D:y('\n'.join(f"error: {A}"for A in str(D).splitlines()),file=b.stderr);return B9 if X(D,O)else BA
	finally:
		if A is not None and A.world_size>1:R.destroy_process_group()
if __name__=='__main__':b.exit(CH())
