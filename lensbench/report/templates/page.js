(function(){
var tip=document.getElementById('tip');
function show(text,x,y){tip.textContent=text;tip.className='on';var b=tip.getBoundingClientRect();
 tip.style.left=Math.max(4,Math.min(x+14,innerWidth-b.width-4))+'px';
 tip.style.top=(y+18+b.height>innerHeight?Math.max(4,y-b.height-10):y+18)+'px';}
function hide(){tip.className='';}
['pointermove','pointerdown'].forEach(function(kind){document.addEventListener(kind,function(e){var t=e.target.closest&&e.target.closest('[data-tip]');
 if(t)show(t.getAttribute('data-tip'),e.clientX,e.clientY);else hide();});});
document.addEventListener('focusin',function(e){var t=e.target.closest&&e.target.closest('[data-tip]');
 if(t){var b=t.getBoundingClientRect();show(t.getAttribute('data-tip'),b.left,b.bottom);}});
document.addEventListener('focusout',hide);
document.addEventListener('keydown',function(e){
 var svg=e.target.closest&&e.target.closest('svg[data-size]');if(!svg)return;
 if(e.key==='Escape'){hide();return;}
 var step={ArrowLeft:[0,-1],ArrowRight:[0,1],ArrowUp:[-1,0],ArrowDown:[1,0]}[e.key];if(!step)return;e.preventDefault();
 var n=+svg.dataset.size,at=(svg.dataset.at||'0,0').split(',').map(Number);
 at=[Math.max(0,Math.min(n-1,at[0]+step[0])),Math.max(0,Math.min(n-1,at[1]+step[1]))];svg.dataset.at=at.join(',');
 svg.querySelectorAll('rect.on').forEach(function(r){r.classList.remove('on');});
 var cell=svg.querySelector('rect[data-cell="'+at.join(',')+'"]');if(!cell)return;cell.classList.add('on');
 var b=cell.getBoundingClientRect();show(cell.getAttribute('data-tip'),b.left,b.bottom);});
document.querySelectorAll('table.flow').forEach(function(table){
 var heads=Array.prototype.map.call(table.tHead.rows[0].cells,function(h){return h.textContent.trim();});
 Array.prototype.forEach.call(table.tBodies[0].rows,function(row){Array.prototype.forEach.call(row.cells,function(c,k){
  c.dataset.name=heads[k];if(!c.textContent.trim()&&!c.firstElementChild)c.classList.add('empty');});});});
document.querySelectorAll('th button').forEach(function(button){button.addEventListener('click',function(){
 var th=button.parentNode,table=th.closest('table'),body=table.tBodies[0],k=th.cellIndex;
 var up=th.getAttribute('aria-sort')!=='ascending';
 table.querySelectorAll('th').forEach(function(h){h.removeAttribute('aria-sort');});
 th.setAttribute('aria-sort',up?'ascending':'descending');
 function key(row){var c=row.cells[k],v=c.dataset.value!==undefined?c.dataset.value:c.textContent;
  return v===''?null:(isNaN(v)?v:+v);}
 Array.prototype.slice.call(body.rows).sort(function(a,b){var x=key(a),y=key(b);
  if(x===null||y===null)return (x===null)-(y===null);
  var c=typeof x==='number'&&typeof y==='number'?x-y:String(x).localeCompare(String(y));return up?c:-c;
 }).forEach(function(row){body.appendChild(row);});});});
window.addEventListener('beforeprint',function(){document.querySelectorAll('details[data-print]').forEach(function(d){d.open=true;});});
})();
